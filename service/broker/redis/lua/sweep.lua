-- replica, id of the last news it has read, milliseconds since the last sweep; how many leases had run out
go_on_when_full()
local count = sweep(tonumber(arg(3)))
call('ZADD', REPLICAS, now, arg(1))
call('PEXPIRE', REPLICAS, DAY)
call('XTRIM', P .. 'inbox:' .. arg(1), 'MINID', arg(2))
return count
