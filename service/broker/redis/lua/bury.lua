-- worker: it is dead, as who started it knows; another may come under its name
go_on_when_full()
local owner = call('HGET', P .. 'worker:' .. arg(1), 'owner')
if not owner then return 0 end
local count = give_on_all_of(owner, 'the worker died')
forget_worker(arg(1))
return count
