#!lua flags=allow-oom
-- Hands back what a pop took whose reply never arrived.
--
-- KEYS: none.
-- ARGV: token of the pop.
-- Uses _lists.lua, _counts.lua, _moves.lua.

local leases = redis.call('HGETALL', LEASES)
for i = 1, #leases, 2 do
  local list, tokens, bytes = list_held(leases[i], ARGV[1])
  if list then put_back(leases[i], list, tokens, bytes, true) end
end
settle()
