-- id, op, lane, model, rows, cost, caller, priority, weight, timeout, keep, detached, replica, key of the idempotency
-- mapping or '', fingerprint, caller's list, most waiting cost, most of one caller, most that this caller has
-- open, payload, recipe or '', id of the request or ''
--
-- May be sent again with the same id when the answer was lost.
local id, cost, caller, detached, replica = arg(1), tonumber(arg(6)), arg(7), arg(12), arg(13)
local key = P .. 'job:' .. id
if call('EXISTS', key) == 1 then return {'ok', id} end

local idempotency = ''
if arg(14) ~= '' then
  idempotency = P .. 'idempotency:' .. arg(14)
  local known = call('GET', idempotency)
  local earlier, fingerprint = string.match(known or '', '^(%S+) (.*)$')
  local job = earlier and load(earlier)
  if job then
    if fingerprint ~= arg(15) then return {'idempotency_key_reused'} end
    if detached == '0' and not has_ended(job) then tell_too(job, replica) end
    return {'repeated', earlier}
  end
end

local refusal = refused(arg(4), cost, caller, tonumber(arg(17)), tonumber(arg(18)), tonumber(arg(19)))
if refusal then return refusal end

local number = call('HINCRBY', STATE, 'number', 1)
if call('ZCARD', DEADLINES) == 0 then rouse() end
if call('HINCRBY', STATE, 'open:' .. arg(3), 1) == 1 then begin_anew(arg(3)) end
if caller ~= '' then call('HINCRBY', OPEN, caller, cost) end
local last, start = turn(arg(3), arg(8) .. ':' .. caller, cost, tonumber(arg(9)))
local inboxes = detached == '0' and replica or ''
call('HSET', key, 'state', 'queued', 'op', arg(2), 'lane', arg(3), 'model', arg(4), 'rows', arg(5), 'cost', arg(6),
  'caller', caller, 'attempt', 1, 'owner', '', 'finish', exact(last), 'start', exact(start), 'number', number,
  'created', now, 'deadline', now + arg(10), 'timeout', arg(10), 'keep', arg(11), 'detached', detached,
  'idempotency', idempotency, 'inboxes', inboxes, 'progress', 0, 'payload', arg(20))
call('ZADD', DEADLINES, now + arg(10), id)
if arg(21) ~= '' then call('HSET', key, 'recipe', arg(21)) end
if arg(22) ~= '' then call('HSET', key, 'request', arg(22)) end
if idempotency ~= '' then call('SET', idempotency, id .. ' ' .. arg(15)) end
if detached == '1' then
  event(id, 'queued')
  -- The list of a caller's jobs outlives every job in it. More is looked at than is added, wherever it is in the list, so
  -- that those forgotten cannot outnumber the others for long.
  local list = P .. 'jobs:' .. arg(16)
  for _, old in ipairs(call('ZRANDMEMBER', list, 4)) do
    if call('EXISTS', P .. 'job:' .. old) == 0 then call('ZREM', list, old) end
  end
  call('ZADD', list, number, id)
  call('PEXPIRE', list, math.max(call('PTTL', list), arg(10) + arg(11) + DAY))
else
  call('SADD', P .. 'attached:' .. replica, id)
end
enqueue(load(id))
return {'ok', id}
