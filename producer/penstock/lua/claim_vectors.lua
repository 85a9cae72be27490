-- Finds vectors in the cache, and claims the texts that nobody computes.
-- A Redis that is full answers what it has: hence pcall. What cannot be claimed is computed all the same.
--
-- KEYS: vectors in use, claim, texts.
-- ARGV: claim's ms, weight, heaviest to wait for, text's claim in ms.
-- Returns for each text its vector, 1 where the caller has to compute it, 0 where another does.

local time, answers, claimed = redis.call('TIME'), {}, false
local values = redis.call('MGET', unpack(KEYS, 3))
for i, value in ipairs(values) do
  local key = KEYS[i + 2]
  if value and value:sub(1, 1) == 'v' then
    redis.pcall('ZADD', KEYS[1], 'XX', time[1] + time[2] / 1e6, key)
    answers[i] = value
  else
    local claim, weight = (value or ''):match('^c(%S+) (%S+)$')
    if claim and tonumber(weight) <= tonumber(ARGV[3]) and redis.call('EXISTS', claim) == 1 then
      answers[i] = 0
    else
      redis.pcall('SET', key, 'c' .. KEYS[2] .. ' ' .. ARGV[2], 'PX', ARGV[4])
      answers[i], claimed = 1, true
    end
  end
end
if claimed then redis.pcall('SET', KEYS[2], '1', 'PX', ARGV[1]) end
return answers
