-- model, name, id, owner, lease, done: whether the claim counts still.
local model, name, id, owner, lease, done = unpack(ARGV)
go_on_when_full()
heard()
if not is_claimed(model, name, id, owner) then return 0 end
call('HSET', run_key(model, name), 'lease', now + tonumber(lease), 'done', done)
return 1
