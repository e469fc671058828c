-- model, name, id, job, replace, most: accept what was written under an id; without an id, only say what would come of
-- it. {'placed'}, {'taken', whether it is in the making}, {'too_many', how many}, or {'lost'}: its images have expired.
local model, name, id, job, replace, most = unpack(ARGV)
local key = run_key(model, name)
local found = call('HMGET', key, 'id', 'error')
if id ~= '' and found[1] == id then return {'placed'} end

local running = found[1] and not found[2]
if replace == '0' and (running or call('EXISTS', calibration_key(model, name)) == 1) then
  return {'taken', running and 1 or 0}
end
local names, count = {}, 0
local function add(other)
  if not names[other] then names[other], count = true, count + 1 end
end
for _, other in ipairs(call('SMEMBERS', names_key(model))) do add(other) end
for _, member in ipairs(call('ZRANGE', RUNS, 0, -1)) do
  local of, other = string.match(member, '^(.*):(.*)$')
  if of == model then add(other) end
end
if not names[name] and count >= tonumber(most) then return {'too_many', count} end
if id == '' then return {'placed'} end

if call('PERSIST', images_key(id)) == 0 then return {'lost'} end
forget_run(model, name)
call('HSET', key, 'id', id, 'job', job, 'done', 0, 'crashes', 0, 'owner', '', 'lease', 0)
-- Two in the same millisecond have an order, too.
local last = call('ZREVRANGE', RUNS, 0, 0, 'WITHSCORES')[2]
call('ZADD', RUNS, math.max(now, last and last + 1 or 0), model .. ':' .. name)
return {'placed'}
