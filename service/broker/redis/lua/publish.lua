-- owner, id, attempt, kind, packed data
local job = owned(arg(2), arg(1), arg(3))
if not job or job.detached ~= '1' then return 0 end
call('XADD', P .. 'events:' .. job.id, 'MAXLEN', '~', EVENTS, '*', 'k', arg(4), 't', now, 'd', arg(5))
return 1
