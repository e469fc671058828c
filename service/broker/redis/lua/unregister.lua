-- worker, owner
go_on_when_full()
local count = give_on_all_of(arg(2), 'its worker was lost')
if call('HGET', P .. 'worker:' .. arg(1), 'owner') == arg(2) then forget_worker(arg(1)) end
return count
