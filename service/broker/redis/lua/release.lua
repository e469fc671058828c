-- owner, id, attempt, reason
local job = owned(arg(2), arg(1), arg(3))
if not job then return 0 end
go_on_when_full()
put_back(job, tonumber(job.attempt), arg(4))
return 1
