-- model, name, id, owner, how, error (JSON): give up a claim that counts. `release` leaves the run to others,
-- `interrupt` until a process starts; `fail` is the end, and the images are of no use.
local model, name, id, owner, how, error = unpack(ARGV)
if not is_claimed(model, name, id, owner) then return 0 end
go_on_when_full()
local key = run_key(model, name)
call('HINCRBY', key, 'crashes', -1)
call('HSET', key, 'owner', '', 'lease', 0)
if how == 'fail' then call('UNLINK', images_key(id)) end
if how ~= 'release' then call('HSET', key, 'error', error) end
if how == 'interrupt' then call('HSET', key, 'interrupted', 1) end
return 1
