#!lua flags=allow-oom
-- Requeues a message whose worker failed on it, as the last one; that counts as a lease that ran out.
--
-- KEYS: none.
-- ARGV: tag, token, most deliveries.
-- Returns nothing if it went back, else its list, how often it was delivered, and the message: the caller still holds it,
-- and must dead-letter it.
-- Uses _lists.lua, _counts.lua, _moves.lua.

local name = ARGV[1]
local list, tokens, bytes = list_held(name, ARGV[2])
if not list then return {} end
local lost = number_in(redis.call('HGET', LOST, tag_in(name)), 0) + 1
redis.call('HSET', LOST, tag_in(name), lost)
local message = redis.call('HGET', UNACKED, name)
if message and lost >= tonumber(ARGV[3]) then return {list, lost, as_told(message)} end
if message then requeue(name, list, tokens, bytes, false) end
settle()
return {}
