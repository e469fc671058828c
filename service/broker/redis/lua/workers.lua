-- Of each worker: id, device, digests of its models' metadata, how long ago it was heard, measurements, states.
local answer = {}
local workers = call('ZRANGE', WORKERS, 0, -1, 'WITHSCORES')
for i = 1, #workers, 2 do
  local worker = call('HMGET', P .. 'worker:' .. workers[i], 'device', 'digests', 'measurements', 'states')
  if worker[1] then
    answer[#answer + 1] = {workers[i], worker[1], worker[2], math.max(0, now - workers[i + 1]), worker[3] or '',
      worker[4]}
  end
end
return answer
