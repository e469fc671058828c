-- owner, id, attempt, token, state, error or '', result or ''
--
-- The token names this delivery: when its answer was lost and it is sent again, it is known as delivered.
local id, token = arg(2), arg(4)
local job = owned(id, arg(1), arg(3))
if not job then return call('HGET', P .. 'job:' .. id, 'token') == token and 1 or 0 end
go_on_when_full()
if arg(5) == 'completed' then
  local rate = call('HMGET', STATE, 'rate', 'rated')
  local before = rate[1] and rate[1] * math.exp(-(now - rate[2]) / 30000) or 0
  call('HSET', STATE, 'rate', exact(before + job.cost / 30000), 'rated', now)
end
finish(job, arg(5), arg(6) ~= '' and arg(6) or nil, arg(7) ~= '' and arg(7) or nil, token)
return 1
