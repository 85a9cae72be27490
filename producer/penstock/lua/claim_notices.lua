#!lua flags=allow-oom
-- Finds dead letters whose notice is still pending; the caller notifies their senders.
--
-- KEYS: none.
-- ARGV: seconds until another may notify, most entries.
-- Returns the entries.
-- Uses _lists.lua.

local entries = redis.call('ZRANGEBYSCORE', UNTOLD, '-inf', now(), 'LIMIT', 0, tonumber(ARGV[2]))
for _, entry in ipairs(entries) do redis.call('ZADD', UNTOLD, now() + tonumber(ARGV[1]), entry) end
return entries
