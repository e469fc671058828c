-- owner, lease, models...: the oldest run that nobody makes, for this owner, who makes one at a time: a run that it has
-- already was given in an answer that was lost. {model, name, id, job,
-- crashes before}, or nothing.
local owner, lease = ARGV[1], tonumber(ARGV[2])
local wanted = {}
for i = 3, #ARGV do wanted[ARGV[i]] = true end

go_on_when_full()
local gap = now - tonumber(call('GET', HEARD) or now)
heard()
local found
for _, member in ipairs(call('ZRANGE', RUNS, 0, -1)) do
  local model, name = string.match(member, '^(.*):(.*)$')
  local key = run_key(model, name)
  local has, until_, failed = unpack(call('HMGET', key, 'owner', 'lease', 'error'))
  until_ = tonumber(until_ or 0)
  if has and has ~= '' and has ~= owner and gap > OUTAGE and until_ < now + math.min(lease, GRACE) then
    until_ = now + math.min(lease, GRACE)
    call('HSET', key, 'lease', until_)
  end
  if has == owner then
    found = {model, name, key}
    call('HINCRBY', key, 'crashes', -1)
    break
  end
  if not found and has and not failed and wanted[model] and (has == '' or until_ < now) then
    found = {model, name, key}
  end
end
if not found then return {} end
local model, name, key = unpack(found)
local crashes = call('HINCRBY', key, 'crashes', 1) - 1
call('HSET', key, 'owner', owner, 'lease', now + lease, 'done', 0)
local id, job = unpack(call('HMGET', key, 'id', 'job'))
return {model, name, id, job, crashes}
