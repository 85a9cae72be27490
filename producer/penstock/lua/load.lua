#!lua flags=allow-oom
-- Says what a queue has.
--
-- KEYS: a list.
-- ARGV: none.
-- Returns jobs, tokens and bytes of its queue, and the tokens before a message that comes now.
-- Uses _lists.lua, _counts.lua.

local n, t, b, ahead = load_of(KEYS[1])
show_anew(queue_of(KEYS[1]))
return {n, math.ceil(t), math.ceil(b), math.ceil(ahead)}
