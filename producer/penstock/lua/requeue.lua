#!lua flags=allow-oom
-- Requeues messages; counts no lost lease.
--
-- KEYS: none.
-- ARGV: 1 to be the next ones in their lists, 0 the last; then tag, token; of each.
-- Uses _lists.lua, _counts.lua, _moves.lua.

for i = 2, #ARGV, 2 do
  local list, tokens, bytes = list_held(ARGV[i], ARGV[i + 1])
  if list then requeue(ARGV[i], list, tokens, bytes, ARGV[1] == '1') end
end
settle()
