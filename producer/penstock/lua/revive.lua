#!lua flags=
-- Takes a message out of the dead-letter list; the caller holds it then, and requeues it.
--
-- KEYS: none.
-- ARGV: entry of the dead-letter list, its message, the list it goes to, token, lease in seconds.
-- Returns its tag, or nil if the entry is gone.
-- Uses _lists.lua, _counts.lua, _moves.lua.

if redis.call('LREM', DEAD, 1, ARGV[1]) == 0 then return false end
redis.call('ZREM', UNTOLD, ARGV[1])
local name = free_name(UNACKED, tag_of(ARGV[2]))
hold(name, ARGV[2], ARGV[4], ARGV[3], now() + tonumber(ARGV[5]))
settle()
return name
