-- id
local job = load(arg(1))
if not job or has_ended(job) then return 0 end
go_on_when_full()
finish(job, 'canceled', refusal('Canceled', 'canceled', 'the request was canceled'))
return 1
