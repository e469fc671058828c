-- ids, of which the unknown are left out; or, of a caller's list: '', the list's name, how many
--
-- The list has ids of jobs that are forgotten, too; they go as they are met. Answers with 0 when so many went that one
-- should ask again for the rest: nothing else is done in Redis meanwhile.
local PAGE, MOST_GONE = 100, 1000

local ids = {}
if arg(1) == '' then
  local list, limit, seen, num_gone = P .. 'jobs:' .. arg(2), tonumber(arg(3)), 0, 0
  while #ids < limit do
    local page, gone = call('ZREVRANGE', list, seen, seen + PAGE - 1), {}
    if #page == 0 then break end
    for _, id in ipairs(page) do
      if call('EXISTS', P .. 'job:' .. id) == 0 then
        gone[#gone + 1] = id
      elseif #ids < limit then
        ids[#ids + 1] = id
      end
    end
    if #gone > 0 then call('ZREM', list, unpack(gone)) end
    seen, num_gone = seen + #page - #gone, num_gone + #gone
    if num_gone >= MOST_GONE then return 0 end
  end
else
  for i = 1, #ARGV - 5 do ids[#ids + 1] = arg(i) end
end

-- Jobs of the lane that come before it, over all models.
local function position(lane, model, number, finish, id)
  local own = string.format('%016d', number) .. ':' .. id
  local before = 0
  for _, name in ipairs(call('ZRANGE', MODELS, 0, -1)) do
    if name ~= model then
      before = before + call('ZCOUNT', ready(lane, name), '-inf', '(' .. finish)
      for _, other in ipairs(call('ZRANGEBYSCORE', ready(lane, name), finish, finish)) do
        if other < own then before = before + 1 end
      end
    end
  end
  return before + (call('ZRANK', ready(lane, model), own) or 0)
end

local answer = {}
for _, id in ipairs(ids) do
  local job = call('HMGET', P .. 'job:' .. id, 'state', 'op', 'model', 'caller', 'rows', 'attempt', 'progress', 'created',
    'started', 'ended', 'expires', 'error', 'lane', 'number', 'finish')
  if job[1] then
    job[13] = job[1] == 'queued' and position(job[13], job[3], job[14], job[15], id) or -1
    job[14], job[15] = id, nil
    answer[#answer + 1] = job
  end
end
return answer
