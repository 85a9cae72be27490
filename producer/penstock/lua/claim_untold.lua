#!lua flags=allow-oom
-- Finds dead letters whose teller did not finish; the caller tells.
--
-- KEYS: none.
-- ARGV: seconds until another may tell, most entries.
-- Returns the entries.
-- Uses _lists.lua.

local entries = redis.call('ZRANGEBYSCORE', UNTOLD, '-inf', now(), 'LIMIT', 0, tonumber(ARGV[2]))
for _, entry in ipairs(entries) do redis.call('ZADD', UNTOLD, now() + tonumber(ARGV[1]), entry) end
return entries
