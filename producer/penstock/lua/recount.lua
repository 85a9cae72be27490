#!lua flags=allow-oom
-- Counts anew what is held of queues, so that nothing stays that was counted wrong.
--
-- KEYS: the plain lists of the queues.
-- ARGV: none.
-- Uses _lists.lua, _counts.lua, _moves.lua.

local held = {}
for _, queue in ipairs(KEYS) do held[queue] = {} end
local leases = redis.call('HGETALL', LEASES)
for i = 1, #leases, 2 do
  local list, tokens, bytes = list_held(leases[i], string.match(leases[i + 1], '^[^\n]*'))
  local of = list and held[queue_of(list)]
  if of then
    local sum = of[level_of(list)] or {n = 0, t = 0, b = 0}
    sum.n, sum.t, sum.b = sum.n + 1, sum.t + tokens, sum.b + bytes
    of[level_of(list)] = sum
  end
end
for queue, of in pairs(held) do
  for _, level in ipairs(LEVELS) do
    forget(queue, 'held:' .. level)
    local sum = of[level]
    if sum then
      local new = note(queue, 'held:' .. level)
      new.n, new.t, new.b = sum.n, sum.t, sum.b
    end
  end
  show(queue)
end
settle()
