-- worker, owner, device, whether this is the owner's first time, packed states, and of each model: name, digest,
-- packed metadata
local worker, owner = arg(1), arg(2)
local key = P .. 'worker:' .. worker
local before = call('HMGET', key, 'owner', 'names')
if before[1] and before[1] ~= owner and arg(4) == '0' then return 0 end
go_on_when_full()
-- A worker of this name that began anew has nothing of what its predecessor had.
if before[1] and before[1] ~= owner then give_on_all_of(before[1], 'its worker was started again') end
local names, digests, serves = {}, {}, {}
for i = 6, #ARGV - 5, 3 do
  names[#names + 1], digests[#digests + 1] = arg(i), arg(i + 1)
  serves[arg(i)] = true
  call('SET', P .. 'info:' .. arg(i + 1), arg(i + 2))
  call('HSET', DIGESTS, arg(i), arg(i + 1))
end
call('HSET', key, 'owner', owner, 'device', arg(3), 'names', table.concat(names, '\n'),
  'digests', table.concat(digests, ' '), 'states', arg(5))
call('ZADD', WORKERS, now, worker)
for name in string.gmatch(before[2] or '', '[^\n]+') do
  if not serves[name] then
    unserve(worker, name)
    -- What its last worker put down by itself is not awaited back.
    if call('ZCARD', P .. 'serving:' .. name) == 0 then
      call('HDEL', DIGESTS, name)
      call('ZREM', MODELS, name)
    end
  end
end
heard(worker, true)
ring()
return 1
