#!lua flags=allow-oom
-- Moves delayed messages that are due into their lists; the earliest becomes the next one.
-- What names a list that is no queue is dropped: nobody but its sender can have meant it.
--
-- KEYS: none.
-- ARGV: most messages.
-- Returns how many were moved, and milliseconds until the next is due or -1.
-- Uses _lists.lua, _counts.lua, _moves.lua.

local names = redis.call('ZRANGEBYSCORE', DUE, '-inf', now(), 'LIMIT', 0, tonumber(ARGV[1]))
for i = #names, 1, -1 do
  local entry = redis.call('HGET', DELAYED, names[i])
  local digits = string.match(entry or '0:', '^(%d+):')
  local is_moved = not entry
  if entry and digits then
    local list_end = #digits + 1 + tonumber(digits)
    local list = string.sub(entry, #digits + 2, list_end)
    is_moved = not is_queue(list) or type(insert(list, string.sub(entry, list_end + 1), true)) == 'number'
  end
  if is_moved then
    redis.call('HDEL', DELAYED, names[i])
    redis.call('ZREM', DUE, names[i])
  else
    redis.call('ZADD', DUE, now() + 60, names[i]) -- its list is none: the others must not wait for it
  end
end
settle()
local first = redis.call('ZRANGE', DUE, 0, 0, 'WITHSCORES')
local wait_ms = -1
if first[2] then wait_ms = math.max(0, math.ceil((tonumber(first[2]) - now()) * 1000)) end
return {#names, wait_ms}
