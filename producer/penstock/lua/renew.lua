#!lua flags=allow-oom
-- Renews leases.
--
-- KEYS: none.
-- ARGV: lease in seconds, then tag, token; of each.
-- Returns the tags that the token does not hold.
-- Uses _lists.lua, _moves.lua.

local lease_end, theirs = now() + tonumber(ARGV[1]), {}
for i = 2, #ARGV, 2 do
  if list_held(ARGV[i], ARGV[i + 1]) then
    redis.call('ZADD', INDEX, lease_end, ARGV[i])
  else
    theirs[#theirs + 1] = ARGV[i]
  end
end
return theirs
