-- What every script begins with. Scripts are: common, fairness, lifecycle, and the operation.
--
-- KEYS[1] is the prefix with its cluster hash tag, so that every key made from it lies in the same slot. The first five
-- arguments are the broker's limits, in milliseconds and attempts; the operation's own come behind them.

local call = redis.call
local P = KEYS[1] .. ':'
local LEASE, READY, MAX_ATTEMPTS = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local REPLICA, SWEEP = tonumber(ARGV[4]), tonumber(ARGV[5])
local function arg(i) return ARGV[5 + i] end

local DAY = 86400000
local HOUR = 3600000
local OUTAGE = 5000 -- when nobody looked after leases for so long, nobody could be heard
local FORGET_WORKER = math.max(60000, 6 * READY)
local FORGET_MODEL = HOUR -- after its last worker
local EVENTS = 256 -- of one job, about
local INBOX = 10000 -- of one replica, about; one that misses some asks again
local INLINE = 16384 -- bytes of a result that come with the news that it is there
local DEAD = 1000 -- dead letters

local STATE = P .. 'state' -- counters, and the virtual time of each lane
local WAITING = P .. 'waiting' -- ids by time of acceptance
local LEASES = P .. 'leases' -- ids by expiry
local DEADLINES = P .. 'deadlines' -- ids of all jobs that have not ended, by when they time out
local SHARES = P .. 'shares' -- waiting cost by named caller
local OPEN = P .. 'open' -- cost of all jobs that have not ended, by named caller
local WORKERS = P .. 'workers' -- ids by when they were heard
local REPLICAS = P .. 'replicas' -- the same of API processes
local MODELS = P .. 'models' -- names by when a worker that serves them was heard
local DIGESTS = P .. 'digests' -- name to digest of the model's metadata
local DOORBELL = P .. 'doorbell'

local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Numbers become text by %.14g in Lua, which is not enough for virtual times.
local function exact(number) return string.format('%.17g', number) end

-- A full memory refuses a script at its first write if that takes memory, and never later. What ends work or hands it
-- out must go on, so its first write is one that takes none.
local function go_on_when_full() call('DEL', P .. 'nothing') end

-- Without work, nothing has to stay for ever.
local LASTING = {STATE, SHARES, OPEN, P .. 'flows:urgent', P .. 'flows:long'}
local function rest() for _, key in ipairs(LASTING) do call('PEXPIRE', key, DAY) end end
local function rouse() for _, key in ipairs(LASTING) do call('PERSIST', key) end end

-- Wakes idle workers; they read the bell's last id before they look for work, so no ringing is missed.
local function ring()
  call('XADD', DOORBELL, 'MAXLEN', '~', 16, '*', 'r', '')
  call('PEXPIRE', DOORBELL, DAY)
end

local function event(id, kind, json)
  call('XADD', P .. 'events:' .. id, 'MAXLEN', '~', EVENTS, '*', 'k', kind, 't', now, 'j', json or '{}')
end
