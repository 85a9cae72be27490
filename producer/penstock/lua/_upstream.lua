-- Part: what is known of a server of remote models; for scripts whose first key is its hash; after _bucket.lua.

local at = now_s()
local state = redis.call('HMGET', KEYS[1], 'hold', 'open', 'probe', 'failures', 'strikes', 'why')
local hold, open, probe = tonumber(state[1] or 0), tonumber(state[2] or 0), tonumber(state[3] or 0)
local failures, strikes = tonumber(state[4] or 0), tonumber(state[5] or 0)
local function reply(word, seconds) return {word, string.format('%.6f', seconds), state[6] or ''} end
