-- Asks whether a request may be sent to a server of remote models, and reserves its place in the rate.
-- A broken server gets one request when its time is up; others ask again soon, for the answer may be there.
--
-- KEYS: state, buckets.
-- ARGV: how long a request may take, then as `take_tokens` in _bucket.lua.
-- Returns a word, seconds to wait, and why.
-- Uses _bucket.lua, _upstream.lua.

if open > at then return reply('open', open - at) end
if probe > at then return reply('open', math.min(probe - at, ASK_PROBE_S)) end
if hold > at then return reply('hold', hold - at) end
local taken = {1, '0'}
if #KEYS > 1 then taken = take_tokens({unpack(KEYS, 2)}, ARGV, 2) end
if taken[1] == 0 then return reply('full', taken[2]) end
if open > 0 then redis.call('HSET', KEYS[1], 'probe', at + taken[2] + ARGV[1]) end
return reply((open > 0 or failures > 0 or strikes > 0) and 'doubt' or 'go', taken[2])
