-- worker, owner, measurements or '', and of each job: id, attempt, fraction, block or '', progress as JSON
--
-- Answers with whether the worker is known, unknown or replaced by another process, the ids that are not its own, and its commands.
local worker, owner = arg(1), arg(2)
local key = P .. 'worker:' .. worker
go_on_when_full()
local registered = call('HGET', key, 'owner')
local known = registered == owner
if known then
  heard(worker)
  if arg(3) ~= '' then call('HSET', key, 'measurements', arg(3)) end
end
local lost = {}
for i = 4, #ARGV - 5, 5 do
  local job = owned(arg(i), owner, arg(i + 1))
  if job and tonumber(job.deadline) <= now then
    time_out(job)
    job = nil
  end
  if job then
    call('ZADD', LEASES, 'XX', now + LEASE, job.id)
    if job.detached == '1' and arg(i + 3) ~= '' and call('HGET', job.key, 'block') ~= arg(i + 3) then
      event(job.id, 'progress', arg(i + 4))
    end
    call('HSET', job.key, 'progress', arg(i + 2), 'block', arg(i + 3))
  else
    lost[#lost + 1] = arg(i)
  end
end
-- Only now: who is heard keeps what it has, even when it was silent for too long and nobody has noticed yet.
sweep(SWEEP)
local commands = known and call('LRANGE', P .. 'commands:' .. worker, 0, -1) or {}
if #commands > 0 then call('DEL', P .. 'commands:' .. worker) end
return {known and 'known' or registered and 'replaced' or 'unknown', lost, commands}
