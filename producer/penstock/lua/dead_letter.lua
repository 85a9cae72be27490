#!lua flags=allow-oom
-- Dead-letters a message.
--
-- KEYS: none.
-- ARGV: tag, token, JSON object without `at`, 1 if its sender must be notified, seconds until another may do so.
-- Returns the entry of the dead-letter list, or nil if the token does not hold the message.
-- Uses _lists.lua, _counts.lua, _moves.lua.

local list, tokens, bytes = list_held(ARGV[1], ARGV[2])
if not list then return false end
local entry = string.sub(ARGV[3], 1, -2) .. string.format(',"at":%.6f}', now())
local n_dead = redis.call('RPUSH', DEAD, entry)
if n_dead > MOST_DEAD then
  redis.call('LTRIM', DEAD, n_dead - MOST_DEAD, -1)
  redis.call('HINCRBY', SWEEP, 'dropped', n_dead - MOST_DEAD)
end
if ARGV[4] == '1' then
  redis.call('ZADD', UNTOLD, now() + tonumber(ARGV[5]), entry)
  redis.call('ZREMRANGEBYRANK', UNTOLD, 0, -1 - MOST_DEAD)
end
drop(ARGV[1], list, tokens, bytes)
forget_past(ARGV[1])
settle()
return entry
