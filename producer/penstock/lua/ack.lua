#!lua flags=allow-oom
-- Acknowledges messages.
--
-- KEYS: none.
-- ARGV: tag, token; of each.
-- Returns the tags that the token does not hold: others have taken them over.
-- Uses _lists.lua, _counts.lua, _moves.lua.

local theirs = {}
for i = 1, #ARGV, 2 do
  local list, tokens, bytes = list_held(ARGV[i], ARGV[i + 1])
  if list then
    drop(ARGV[i], list, tokens, bytes)
    forget_past(ARGV[i])
  else
    theirs[#theirs + 1] = ARGV[i]
  end
end
settle()
return theirs
