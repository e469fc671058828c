-- What every script begins with. KEYS[1] is the prefix with its cluster hash tag; every key is made from it.
--
-- calibrations:MODEL             names of what is finished
-- calibration:MODEL:NAME         version, data
-- calibrating                    MODEL:NAME of every run, by when it was accepted
-- calibrating:MODEL:NAME         id, job (JSON), done, crashes, owner, lease, error (JSON), interrupted
-- calibrating-images:ID          pixels of a run in chunks; until it is placed they expire

local call = redis.call
local P = KEYS[1] .. ':'
local RUNS = P .. 'calibrating'
local HEARD = P .. 'calibrating-heard' -- when somebody last asked for work or worked
local OUTAGE = 5000 -- when nobody was heard for so long, those who work could not be
local GRACE = 15000 -- what they then get to be heard again
local DAY = 86400000

local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function run_key(model, name) return RUNS .. ':' .. model .. ':' .. name end
local function images_key(id) return P .. 'calibrating-images:' .. id end
local function calibration_key(model, name) return P .. 'calibration:' .. model .. ':' .. name end
local function names_key(model) return P .. 'calibrations:' .. model end

-- A full memory refuses a script at its first write if that takes memory, and never later. What ends work or goes on
-- with it must go on, so its first write is one that takes none.
local function go_on_when_full() call('DEL', P .. 'nothing') end

local function keep(model, name, version, data)
  call('HSET', calibration_key(model, name), 'version', version, 'data', data)
  call('SADD', names_key(model), name)
end

local function forget_run(model, name)
  local key = run_key(model, name)
  local id = call('HGET', key, 'id')
  if not id then return 0 end
  call('UNLINK', images_key(id))
  call('DEL', key)
  call('ZREM', RUNS, model .. ':' .. name)
  return 1
end

-- Whether a run is this owner's, in this claim.
local function is_claimed(model, name, id, owner)
  local found = call('HMGET', run_key(model, name), 'id', 'owner')
  return found[1] == id and found[2] == owner
end

-- Without calibrations in the making, nothing has to stay for ever.
local function heard() call('SET', HEARD, now, 'PX', DAY) end
