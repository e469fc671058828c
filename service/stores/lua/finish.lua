-- model, name, id, owner, version, data: the calibration in the place of the run; whether the claim counted.
local model, name, id, owner, version, data = unpack(ARGV)
if call('HGET', calibration_key(model, name), 'version') == version then return 1 end
if not is_claimed(model, name, id, owner) then return 0 end
-- The images go first, which makes room.
forget_run(model, name)
keep(model, name, version, data)
return 1
