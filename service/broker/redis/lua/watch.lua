-- replica, id; whether there is such a detached job
local job = load(arg(2))
if not job or job.detached ~= '1' then return 0 end
if not has_ended(job) then tell_too(job, arg(1)) end
return 1
