-- worker, owner, most rows, how many lanes, the lanes, the models
--
-- Answers with the doorbell's last id, and id, op, model, rows, cost, attempt, whether detached, the milliseconds
-- that it has waited where this is its first worker, or '', the request's id, and payload of each job.
local worker, owner, max_rows, lanes = arg(1), arg(2), tonumber(arg(3)), tonumber(arg(4))
go_on_when_full()
local registered = call('HGET', P .. 'worker:' .. worker, 'owner')
if registered ~= owner then return {registered and 'replaced' or 'unknown'} end
heard(worker)
sweep(SWEEP)

-- The first of all the models' jobs in a lane.
local function first(lane)
  local best, score, model
  for i = 5 + lanes, #ARGV - 5 do
    local head = call('ZRANGE', ready(lane, arg(i)), 0, 0, 'WITHSCORES')
    if head[1] then
      local finish = tonumber(head[2])
      if not best or finish < score or (finish == score and head[1] < best) then
        best, score, model = head[1], finish, arg(i)
      end
    end
  end
  return best, model
end

local jobs = {}
for i = 1, lanes do
  local lane, rows = arg(4 + i), 0
  while true do
    local head, model = first(lane)
    if not head then break end
    local job = load(string.sub(head, 18))
    if not job then
      call('ZREM', ready(lane, model), head)
    elseif tonumber(job.deadline) <= now then
      time_out(job)
    else
      -- One that was lost before may be what its worker died of, and must not take others along again.
      local lost = tonumber(job.attempt) > 1
      if #jobs > 0 and (lost or rows + job.rows > max_rows) then break end
      dequeue(job)
      call('ZADD', LEASES, now + LEASE, job.id)
      call('HINCRBY', STATE, 'running:' .. job.op, 1)
      local waited = job.started == '' and now - job.created or ''
      call('HSET', job.key, 'state', 'running', 'owner', owner, 'started', job.started ~= '' and job.started or now)
      took(lane, tonumber(job.start))
      if job.detached == '1' then event(job.id, 'started', '{"attempt": ' .. job.attempt .. '}') end
      rows = rows + job.rows
      local rest = call('HMGET', job.key, 'request', 'payload')
      jobs[#jobs + 1] = {job.id, job.op, job.model, job.rows, job.cost, job.attempt, job.detached, waited,
        rest[1] or '', rest[2]}
      if lost then break end
    end
  end
  if #jobs > 0 then break end
end

local bell = call('XREVRANGE', DOORBELL, '+', '-', 'COUNT', 1)
return {bell[1] and bell[1][1] or '0-0', jobs}
