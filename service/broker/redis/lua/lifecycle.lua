-- From one state of a job to the next. A job is one hash; its id is in `waiting` or in `leases` until it has ended.

local FIELDS = {'state', 'op', 'lane', 'model', 'rows', 'cost', 'caller', 'attempt', 'owner', 'finish', 'start', 'number',
  'created', 'started', 'deadline', 'keep', 'detached', 'idempotency', 'inboxes', 'timeout'}

-- The job without its payload and result, or nil for an unknown one.
local function load(id)
  local values = call('HMGET', P .. 'job:' .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local job = {id = id, key = P .. 'job:' .. id}
  for i, name in ipairs(FIELDS) do job[name] = values[i] or '' end
  return job
end

local function has_ended(job) return job.state ~= 'queued' and job.state ~= 'running' end

-- The job when it is this owner's, in this attempt.
local function owned(id, owner, attempt)
  local job = load(id)
  if job and job.state == 'running' and job.owner == owner and job.attempt == attempt then return job end
  return nil
end

local function ready(lane, model) return P .. 'ready:' .. lane .. ':' .. model end

-- Of equal finishes, sorted sets order by member: numbers of equal width, so the first is the first.
local function member(job) return string.format('%016d', job.number) .. ':' .. job.id end

local function enqueue(job)
  call('ZADD', ready(job.lane, job.model), job.finish, member(job))
  call('ZADD', WAITING, job.created, job.id)
  call('HINCRBY', STATE, 'waiting:' .. job.op, 1)
  call('HINCRBY', STATE, 'cost', job.cost)
  if job.caller ~= '' then call('HINCRBY', SHARES, job.caller, job.cost) end
  ring()
end

local function dequeue(job)
  call('ZREM', ready(job.lane, job.model), member(job))
  call('ZREM', WAITING, job.id)
  call('HINCRBY', STATE, 'waiting:' .. job.op, -1)
  call('HINCRBY', STATE, 'cost', -job.cost)
  if job.caller ~= '' and call('HINCRBY', SHARES, job.caller, -job.cost) <= 0 then call('HDEL', SHARES, job.caller) end
end

local function drop_lease(job)
  call('ZREM', LEASES, job.id)
  call('HINCRBY', STATE, 'running:' .. job.op, -1)
end

-- Counted by the name of the error and its code: what they come to is no business of Redis. Texts that cjson cannot read
-- are counted by the state: a job must end whatever its error says.
local function count_end(job, state, error)
  local how = state
  local known, wire = pcall(cjson.decode, error or '')
  if known then how = tostring(wire.error) .. '/' .. tostring(wire.code) end
  call('HINCRBY', STATE, 'ended:' .. job.op .. ':' .. how .. ':' .. job.model, 1)
end

-- Ends a job: its result or error stays for as long as its caller wanted, and all who wait are told.
local function finish(job, state, error, result, token)
  if job.state == 'queued' then dequeue(job) else drop_lease(job) end
  call('ZREM', DEADLINES, job.id)
  call('HINCRBY', STATE, 'open:' .. job.lane, -1)
  if job.caller ~= '' and call('HINCRBY', OPEN, job.caller, -job.cost) <= 0 then call('HDEL', OPEN, job.caller) end
  local keep = math.max(1, tonumber(job.keep))
  call('HDEL', job.key, 'payload', 'owner')
  call('HSET', job.key, 'state', state, 'ended', now, 'expires', now + keep, 'token', token or '')
  if error then call('HSET', job.key, 'error', error) end
  count_end(job, state, error)
  if result then call('HSET', job.key, 'result', result, 'progress', 1) end
  call('PEXPIRE', job.key, keep)
  if job.idempotency ~= '' then
    -- A repetition of what came to nothing is a new attempt.
    if state == 'completed' then call('PEXPIRE', job.idempotency, keep) else call('DEL', job.idempotency) end
  end
  if job.detached == '1' then
    event(job.id, state, error)
    call('PEXPIRE', P .. 'events:' .. job.id, keep)
  end
  local began = job.started ~= '' and job.started or now
  for replica in string.gmatch(job.inboxes, '%S+') do
    local news = {'id', job.id, 'state', state, 'queue', began - job.created}
    if error then news[7], news[8] = 'error', error end
    -- A result that does not stay must be sent along, whatever its size.
    if result and (#result <= INLINE or keep < 10000) then news[7], news[8] = 'result', result end
    call('XADD', P .. 'inbox:' .. replica, 'MAXLEN', '~', INBOX, '*', unpack(news))
    call('PEXPIRE', P .. 'inbox:' .. replica, HOUR)
    call('SREM', P .. 'attached:' .. replica, job.id)
  end
  if call('ZCARD', DEADLINES) == 0 then rest() end
end

local function refusal(kind, code, message) return cjson.encode({error = kind, code = code, message = message}) end

-- Back to its old place in the queue.
local function put_back(job, attempt, reason)
  drop_lease(job)
  job.state, job.attempt, job.owner = 'queued', string.format('%d', attempt), ''
  call('HSET', job.key, 'state', 'queued', 'owner', '', 'attempt', job.attempt, 'progress', 0, 'block', '')
  enqueue(job)
  if job.detached == '1' then
    event(job.id, 'requeued', '{"attempt": ' .. job.attempt .. ', "reason": ' .. cjson.encode(reason) .. '}')
  end
end

-- Another attempt for a job whose worker is gone, or its end and a dead letter when there were too many.
local function give_on(job, reason)
  call('HINCRBY', STATE, 'reclaimed', 1)
  local attempt = tonumber(job.attempt)
  if attempt < MAX_ATTEMPTS then return put_back(job, attempt + 1, reason) end
  call('HINCRBY', STATE, 'dead', 1)
  local letter = {id = job.id, op = job.op, model = job.model, rows = job.rows, attempt = job.attempt,
    worker = job.owner, reason = reason, time = now}
  call('LPUSH', P .. 'dead', cjson.encode(letter))
  call('LTRIM', P .. 'dead', 0, DEAD - 1)
  call('PEXPIRE', P .. 'dead', 7 * DAY)
  finish(job, 'failed', refusal('WorkerLost', 'worker_lost',
    job.attempt .. ' workers in a row were lost while doing this request'))
end

local function time_out(job)
  local message = string.format('not finished within %g seconds; the work was canceled', job.timeout / 1000)
  finish(job, 'failed', refusal('TimedOut', 'timeout', message))
end

local function without(inboxes, replica)
  local others = {}
  for other in string.gmatch(inboxes, '%S+') do
    if other ~= replica then others[#others + 1] = other end
  end
  return table.concat(others, ' ')
end

-- One more API process to be told when the job has ended.
local function tell_too(job, replica)
  if string.find(' ' .. job.inboxes .. ' ', ' ' .. replica .. ' ', 1, true) then return end
  call('HSET', job.key, 'inboxes', job.inboxes == '' and replica or job.inboxes .. ' ' .. replica)
  if job.detached ~= '1' then call('SADD', P .. 'attached:' .. replica, job.id) end
end

-- Jobs that only this API process waited for are nobody's.
local function detach(replica)
  local attached = P .. 'attached:' .. replica
  for _, id in ipairs(call('SMEMBERS', attached)) do
    local job = load(id)
    if job and not has_ended(job) then
      job.inboxes = without(job.inboxes, replica)
      if job.inboxes == '' and job.detached ~= '1' then
        finish(job, 'canceled', refusal('Canceled', 'canceled', 'the process that waited for this request is gone'))
      else
        call('HSET', job.key, 'inboxes', job.inboxes)
      end
    end
  end
  call('DEL', attached, P .. 'inbox:' .. replica)
  call('ZREM', REPLICAS, replica)
end

-- Gives on what is leased to the owner, who is gone.
local function give_on_all_of(owner, reason)
  local count = 0
  for _, id in ipairs(call('ZRANGE', LEASES, 0, -1)) do
    local job = load(id)
    if job and job.owner == owner then
      give_on(job, reason)
      count = count + 1
    end
  end
  return count
end

-- The replica has told its waiters; when it was the last, nobody else can ask for a job that is not detached.
local function forget(id, replica)
  local job = load(id)
  if not job or not has_ended(job) or job.detached == '1' then return end
  local others = without(job.inboxes, replica)
  if others ~= '' then
    call('HSET', job.key, 'inboxes', others)
  else
    call('DEL', job.key)
    if job.idempotency ~= '' and string.match(call('GET', job.idempotency) or '', '^%S+') == id then
      call('DEL', job.idempotency)
    end
  end
end

local function unserve(worker, name)
  call('ZREM', P .. 'serving:' .. name, worker)
end

local function forget_worker(worker)
  for name in string.gmatch(call('HGET', P .. 'worker:' .. worker, 'names') or '', '[^\n]+') do unserve(worker, name) end
  call('DEL', P .. 'worker:' .. worker, P .. 'commands:' .. worker)
  call('ZREM', WORKERS, worker)
end

-- A worker was heard, from its inference loop. One that claims all the time need not be written down each time.
local function heard(worker, anew)
  local last = tonumber(call('ZSCORE', WORKERS, worker) or 0)
  if not anew and now - last < math.min(200, READY / 10) then return end
  local key = P .. 'worker:' .. worker
  call('ZADD', WORKERS, 'XX', now, worker)
  call('PEXPIRE', WORKERS, 2 * FORGET_WORKER)
  call('PEXPIRE', key, 2 * FORGET_WORKER)
  local served = call('HMGET', key, 'names', 'digests')
  for name in string.gmatch(served[1] or '', '[^\n]+') do
    call('ZADD', P .. 'serving:' .. name, now, worker)
    call('PEXPIRE', P .. 'serving:' .. name, 2 * FORGET_WORKER)
    call('ZADD', MODELS, now, name)
  end
  for digest in string.gmatch(served[2] or '', '%S+') do call('PEXPIRE', P .. 'info:' .. digest, 2 * FORGET_MODEL) end
  call('PEXPIRE', MODELS, 2 * FORGET_MODEL)
  call('PEXPIRE', DIGESTS, 2 * FORGET_MODEL)
end

-- Looks after everything that time ends; whoever comes first after `every` milliseconds does it for all.
local function sweep(every)
  local gap = now - tonumber(call('HGET', STATE, 'swept') or 0)
  if gap < every then return 0 end
  go_on_when_full()
  if gap > OUTAGE then
    for _, id in ipairs(call('ZRANGEBYSCORE', LEASES, '-inf', now + LEASE)) do
      call('ZADD', LEASES, 'XX', now + LEASE, id)
    end
    for _, replica in ipairs(call('ZRANGE', REPLICAS, 0, -1)) do call('ZADD', REPLICAS, now, replica) end
  end
  for _, id in ipairs(call('ZRANGEBYSCORE', DEADLINES, '-inf', now, 'LIMIT', 0, 200)) do
    local job = load(id)
    if job then time_out(job) else call('ZREM', DEADLINES, id) end
  end
  local expired = call('ZRANGEBYSCORE', LEASES, '-inf', '(' .. now, 'LIMIT', 0, 200)
  for _, id in ipairs(expired) do
    local job = load(id)
    if job then give_on(job, 'its worker was lost') else call('ZREM', LEASES, id) end
  end
  for _, replica in ipairs(call('ZRANGEBYSCORE', REPLICAS, '-inf', now - REPLICA)) do detach(replica) end
  for _, worker in ipairs(call('ZRANGEBYSCORE', WORKERS, '-inf', now - FORGET_WORKER)) do forget_worker(worker) end
  for _, name in ipairs(call('ZRANGEBYSCORE', MODELS, '-inf', now - FORGET_MODEL)) do
    call('ZREM', MODELS, name)
    call('HDEL', DIGESTS, name)
  end
  call('HSET', STATE, 'swept', now)
  if call('ZCARD', DEADLINES) == 0 then rest() end
  return #expired
end
