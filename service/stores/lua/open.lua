-- What was interrupted goes on.
go_on_when_full()
for _, member in ipairs(call('ZRANGE', RUNS, 0, -1)) do
  local key = RUNS .. ':' .. member
  if call('HDEL', key, 'interrupted') == 1 then call('HDEL', key, 'error') end
end
return 1
