-- service/broker/fairness.py in Lua: start-time fair queueing, one virtual clock a lane. Keep them the same.

local function virtual_now(lane) return tonumber(call('HGET', STATE, 'now:' .. lane) or 0) end

-- The place of a new job of a flow: its virtual finish and start.
local function turn(lane, flow, cost, weight)
  local flows = P .. 'flows:' .. lane
  local start = math.max(virtual_now(lane), tonumber(call('ZSCORE', flows, flow) or 0))
  local finish = start + cost / weight
  call('ZADD', flows, exact(finish), flow)
  return finish, start
end

-- Nothing waits or runs in the lane: what was done while nobody else wanted any is not held against its flow.
local function begin_anew(lane) call('DEL', P .. 'flows:' .. lane) end

-- A job was taken: time goes on, and flows that are behind it are forgotten.
local function took(lane, start)
  if start > virtual_now(lane) then
    call('HSET', STATE, 'now:' .. lane, exact(start))
    call('ZREMRANGEBYSCORE', P .. 'flows:' .. lane, '-inf', exact(start))
  end
end
