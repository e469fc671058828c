-- The counters, named callers with waiting work, and for how long the oldest job waits.
local oldest = call('ZRANGE', WAITING, 0, 0, 'WITHSCORES')
return {call('HGETALL', STATE), call('HLEN', SHARES), oldest[2] and now - oldest[2] or 0}
