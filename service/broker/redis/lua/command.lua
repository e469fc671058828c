-- the command as JSON; how many workers will be told
local workers = call('ZRANGE', WORKERS, 0, -1)
for _, worker in ipairs(workers) do
  call('RPUSH', P .. 'commands:' .. worker, arg(1))
  call('PEXPIRE', P .. 'commands:' .. worker, FORGET_WORKER)
end
return #workers
