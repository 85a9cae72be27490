-- Says how a server of remote models is, and reserves nothing.
--
-- KEYS: state.
-- ARGV: none.
-- Returns a word, seconds, and why.
-- Uses _bucket.lua, _upstream.lua.

if open > at then return reply('open', open - at) end
if hold > at then return reply('hold', hold - at) end
return reply(failures + strikes > 0 and 'doubt' or 'go', 0)
