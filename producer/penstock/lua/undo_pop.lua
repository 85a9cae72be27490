#!lua flags=allow-oom
-- Requeues what a pop took whose reply never arrived: its worker lives, so no lease has to run out.
--
-- KEYS: none.
-- ARGV: token of the pop.
-- Uses _lists.lua, _counts.lua, _moves.lua.

local leases = redis.call('HGETALL', LEASES)
for i = 1, #leases, 2 do
  local list, tokens, bytes = list_held(leases[i], ARGV[1])
  if list then requeue(leases[i], list, tokens, bytes, true) end
end
settle()
