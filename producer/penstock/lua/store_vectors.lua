-- Stores vectors in the cache.
-- Room is made first, some at a time, and each entry is noted before it is written: none escapes the bound.
--
-- KEYS: vectors in use, texts.
-- ARGV: life in ms, most entries, vectors.

local time = redis.call('TIME')
local excess = redis.call('ZCARD', KEYS[1]) + #KEYS - 1 - ARGV[2]
if excess > 0 then
  for _, key in ipairs(redis.call('ZRANGE', KEYS[1], 0, math.min(excess, 1000) - 1)) do
    redis.call('DEL', key)
    redis.call('ZREM', KEYS[1], key)
  end
end
for i = 2, #KEYS do
  redis.call('ZADD', KEYS[1], time[1] + time[2] / 1e6, KEYS[i])
  redis.call('SET', KEYS[i], ARGV[i + 1], 'PX', ARGV[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
