-- replica, id of the last news it has read, milliseconds since the last sweep, and ids of jobs that it has answered;
-- how many leases had run out
local replica = arg(1)
go_on_when_full()
local count = sweep(tonumber(arg(3)))
call('ZADD', REPLICAS, now, replica)
call('PEXPIRE', REPLICAS, DAY)
call('XTRIM', P .. 'inbox:' .. replica, 'MINID', arg(2))
for i = 4, #ARGV - 5 do forget(arg(i), replica) end
return count
