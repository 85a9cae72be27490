#!lua flags=allow-oom
-- Requeues the messages of workers that died, whose leases ran out, as the next ones in their lists.
-- After the last delivery, or if a message cannot go back, the caller holds it and must dead-letter it.
--
-- KEYS: none.
-- ARGV: lease in seconds, most deliveries, most messages, token of the caller.
-- Returns how many leases ran out; then list, tag, deliveries, message of each that is to be dead-lettered.
-- Uses _lists.lua, _counts.lua, _moves.lua.

local time, lease, most = now(), tonumber(ARGV[1]), tonumber(ARGV[2])
local reply = {0}

-- Nobody looked for long: this server was away, and holders had no chance to renew. They get one.
local sweep = redis.call('HMGET', SWEEP, 'last', 'from')
local last, from = number_in(sweep[1], 0), number_in(sweep[2], 0)
if time - last > 0.6 * lease and time > from + 2 * lease then from = time + lease / 2 end
if time < last - 1 then -- the clock was set back: leases would end late, and nobody be taken over before
  from = time + lease / 2
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', INDEX, time + lease, '+inf')) do
    redis.call('ZADD', INDEX, time + lease, name)
  end
end
redis.call('HSET', SWEEP, 'last', time, 'from', from)
if time < from then return reply end

-- Of messages that somebody else has removed.
for _, past in ipairs({LOST, TRIES}) do
  if redis.call('HLEN', past) > MOST_PAST then
    for _, tag in ipairs(redis.call('HRANDFIELD', past, 1000)) do
      if redis.call('HEXISTS', UNACKED, tag) == 0 then redis.call('HDEL', past, tag) end
    end
  end
end

local function claim(name, list, tokens, bytes, n_deliveries, message)
  redis.call('HSET', LEASES, name, lease_of(ARGV[4], list, tokens, bytes))
  redis.call('ZADD', INDEX, time + lease, name)
  for _, field in ipairs({list, name, n_deliveries, as_told(message)}) do reply[#reply + 1] = field end
end

local names = redis.call('ZRANGEBYSCORE', INDEX, '-inf', time, 'LIMIT', 0, tonumber(ARGV[3]))
for i = #names, 1, -1 do -- whose lease ran out first is the next one in its list
  local name = names[i]
  local message, holder = redis.call('HGET', UNACKED, name), redis.call('HGET', LEASES, name)
  local list, tokens, bytes = '', 0, 0
  if holder then list, tokens, bytes = list_held(name, string.match(holder, '^[^\n]*')) end
  if not message then
    drop(name, list, tokens, bytes)
  elseif not holder then
    -- Stock kombu's, whose score is when it was taken: nobody returns it once its hour is over.
    if tonumber(redis.call('ZSCORE', INDEX, name)) < time - 3600 then claim(name, '', 0, 0, 0, message) end
  else
    reply[1] = reply[1] + 1
    local tag = tag_in(name)
    local lost = number_in(redis.call('HGET', LOST, tag), 0)
    if lost < most then
      lost = lost + 1
      redis.call('HSET', LOST, tag, lost)
    end
    if lost < most and type(insert(list, message, true)) == 'number' then
      drop(name, list, tokens, bytes)
    else
      claim(name, list, tokens, bytes, lost, message)
    end
  end
end
settle()
return reply
