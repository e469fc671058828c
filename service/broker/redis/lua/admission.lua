-- Who is let in. Nothing here writes.

local RATE = 30000 -- over how long the rate of work done is taken, decaying

-- Milliseconds until so much waiting work may be done; 0 when nothing is known.
local function delay(excess)
  local rate = call('HMGET', STATE, 'rate', 'rated')
  if not rate[1] then return 0 end
  local per_ms = tonumber(rate[1]) * math.exp(-(now - rate[2]) / RATE)
  if per_ms * 60000 < excess then return 0 end
  return math.max(1000, math.ceil(excess / per_ms))
end

-- nil, or the code of a refusal, how much waits, and after how many milliseconds to try again.
local function refused(model, cost, caller, max_cost, max_share, max_open)
  if call('ZCOUNT', P .. 'serving:' .. model, now - READY, '+inf') == 0 then return {'no_worker', 0, 0} end
  local waiting = tonumber(call('HGET', STATE, 'cost') or 0)
  -- A job that alone exceeds a bound is let in when nothing waits: refusing it always would be a lie.
  if call('ZCARD', WAITING) > 0 and waiting + cost > max_cost then
    return {'queue_full', waiting, delay(waiting + cost - max_cost)}
  end
  if caller ~= '' then
    local share = tonumber(call('HGET', SHARES, caller) or 0)
    if share > 0 and share + cost > max_share then return {'share_full', share, delay(share + cost - max_share)} end
    local open = max_open > 0 and tonumber(call('HGET', OPEN, caller) or 0) or 0
    if open > 0 and open + cost > max_open then
      return {'concurrency_limit_exceeded', open, delay(open + cost - max_open)}
    end
  end
  return nil
end
