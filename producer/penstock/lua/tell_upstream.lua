-- Notes what a server of remote models has answered.
-- Requests that were in flight together count as one overload.
--
-- KEYS: state.
-- ARGV: what happened, why, seconds of the hold or '', most seconds of one that is guessed.
-- Uses _bucket.lua, _upstream.lua.

if ARGV[1] == 'answered' then
  redis.call('HDEL', KEYS[1], 'open', 'probe', 'failures', 'failed', 'cooldown', 'strikes')
  if hold <= at then redis.call('DEL', KEYS[1]) end
  return
end
if ARGV[1] == 'abandoned' then return redis.call('HDEL', KEYS[1], 'probe') end
redis.call('HSET', KEYS[1], 'why', ARGV[2])
redis.call('EXPIRE', KEYS[1], 2 * MAX_HOLD_S)
if ARGV[1] == 'hold' then
  redis.call('HDEL', KEYS[1], 'open', 'probe', 'failures', 'failed', 'cooldown')
  local seconds = tonumber(ARGV[3])
  if hold <= at then
    seconds = seconds or math.min(FIRST_HOLD_S * 2 ^ strikes, ARGV[4])
    redis.call('HSET', KEYS[1], 'strikes', strikes + 1)
  end
  if seconds then redis.call('HSET', KEYS[1], 'hold', math.max(hold, at + seconds)) end
  return
end
local seen = redis.call('HMGET', KEYS[1], 'failed', 'cooldown')
if tonumber(seen[1] or 0) < at - FAILURES_WITHIN_S and open == 0 then failures = 0 end
redis.call('HSET', KEYS[1], 'failures', failures + 1, 'failed', at)
if open > at or failures + 1 < FAILURES_TO_OPEN and open == 0 then return end
local cooldown = open > 0 and math.min(2 * tonumber(seen[2]), MOST_COOLDOWN_S) or FIRST_COOLDOWN_S
redis.call('HSET', KEYS[1], 'open', at + cooldown, 'cooldown', cooldown, 'probe', 0)
