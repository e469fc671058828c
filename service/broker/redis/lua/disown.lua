-- owner, and the ids that it has
--
-- A claim whose answer was lost leased jobs to a worker that does not know of them: they wait again, uncounted.
local has = {}
for i = 2, #ARGV - 5 do has[arg(i)] = true end
go_on_when_full()
for _, id in ipairs(call('ZRANGE', LEASES, 0, -1)) do
  local job = not has[id] and load(id)
  if job and job.owner == arg(1) then put_back(job, tonumber(job.attempt), 'the connection to the worker broke') end
end
return 1
