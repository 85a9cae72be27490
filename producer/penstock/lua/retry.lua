#!lua flags=allow-oom
-- Delays a message that is worth another try; waits for its share of the bucket too.
--
-- KEYS: the bucket of what all may try again.
-- ARGV: tag, token, seconds until it is worth another try, then the bucket's rate and burst.
-- Uses _lists.lua, _counts.lua, _moves.lua, _bucket.lua.

if list_held(ARGV[1], ARGV[2]) then
  local taken = take_tokens(KEYS, {math.huge, tonumber(ARGV[4]), tonumber(ARGV[5]), 1}, 1)
  delay_held(ARGV[1], ARGV[2], now() + tonumber(ARGV[3]) + tonumber(taken[2]))
  redis.call('HINCRBY', TRIES, tag_in(ARGV[1]), 1)
end
settle()
