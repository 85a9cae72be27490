#!lua flags=allow-oom
-- Delays a message that a foreign sender put in its list before it was due.
--
-- KEYS: none.
-- ARGV: tag, token, when it is due in Unix seconds.
-- Uses _lists.lua, _counts.lua, _moves.lua.

if list_held(ARGV[1], ARGV[2]) then delay_held(ARGV[1], ARGV[2], tonumber(ARGV[3])) end
settle()
