-- Part: how a message goes from a list into a lease and back, and the turns of tenants; after _counts.lua.
--
-- A tag is the message's own `delivery_tag`. A token names one pop of one process, so what a process took twice
-- has two tokens: only the last holder acknowledges, renews or requeues.

-- Tenants take turns: who has had least goes first, and what they take counts by their share. A tenant who (re)enters
-- starts at the virtual time of the last message served, or at their own if that is later.
-- Source: Start-time Fair Queuing, Goyal et al. 1996, section 3.
local function enter(base, tenant)
  if redis.call('ZSCORE', TURNS .. base, tenant) then return end
  local first = redis.call('ZRANGE', TURNS .. base, 0, 0, 'WITHSCORES')
  local had = redis.call('ZSCORE', PASSED .. base, tenant)
  local last = first[2] and redis.call('HGET', LOAD .. queue_of(base), 'turn:' .. level_of(base))
  redis.call('ZADD', TURNS .. base, math.max(number_in(last or first[2], 0), number_in(had, 0)), tenant)
  if had then redis.call('ZREM', PASSED .. base, tenant) end
end

local function leave(base, tenant)
  local had = redis.call('ZSCORE', TURNS .. base, tenant)
  redis.call('ZREM', TURNS .. base, tenant)
  local first = redis.call('ZRANGE', TURNS .. base, 0, 0, 'WITHSCORES')
  if first[2] then
    local last = redis.call('HGET', LOAD .. queue_of(base), 'turn:' .. level_of(base))
    redis.call('ZREMRANGEBYSCORE', PASSED .. base, '-inf', number_in(last, first[2]))
    if had then redis.call('ZADD', PASSED .. base, had, tenant) end
  else
    redis.call('DEL', PASSED .. base)
    redis.call('HDEL', LOAD .. queue_of(base), 'turn:' .. level_of(base))
    forget(queue_of(base), level_of(base) .. '+')
  end
end

-- Puts a message into a list, as the next one or as the last. Returns the list's length, or an error.
local function insert(list, message, as_next)
  if not is_queue(list) then return redis.error_reply('ERR no queue has this name') end
  local length = redis.pcall(as_next and 'RPUSH' or 'LPUSH', list, message)
  if type(length) ~= 'number' then return length end
  local base, tenant = split(list)
  if length == 1 and tenant ~= '' then
    enter(base, tenant)
    forget(list, 'own')
  elseif length == 1 and select(3, cost_of(message)) then
    forget(queue_of(list), level_of(list))
  end
  tally(list, 1, message)
  show(list, 1)
  seen[queue_of(list)] = length
  wake(list)
  return length
end

-- Takes the next message out of a list; the caller has read it. Returns its tokens, and whether the list is empty.
local function remove(list, message)
  redis.call('RPOP', list)
  show(list, -1)
  local tokens = tally(list, -1, message)
  local is_empty = redis.call('EXISTS', list) == 0
  if is_empty then
    local base, tenant = split(list)
    if tenant ~= '' then forget(list, 'own') else forget(queue_of(list), level_of(list)) end
    if base ~= queue_of(base) then redis.call('HDEL', LOAD .. queue_of(base), 'age:' .. level_of(base)) end
  end
  return tokens, is_empty
end

-- The list that the message came from if `token` holds it, else nil; its tokens and bytes.
local function list_held(name, token)
  local lease = redis.call('HGET', LEASES, name)
  if lease and string.sub(lease, 1, #token + 1) == token .. '\n' then
    local list, tokens, bytes = string.match(lease, '^[^\n]*\n([^\n]*)\n?(%d*)\n?(%d*)$')
    return list, tonumber(tokens) or 0, tonumber(bytes) or 0
  end
end

local function lease_of(token, list, tokens, bytes) return table.concat({token, list, tokens, bytes}, '\n') end

local function hold(name, message, token, list, lease_end)
  local tokens, bytes = cost_of(message)
  redis.call('HSET', UNACKED, name, message)
  redis.call('ZADD', INDEX, lease_end, name)
  redis.call('HSET', LEASES, name, lease_of(token, list, tokens, bytes))
  count(queue_of(list), 'held:' .. level_of(list), 1, tokens, bytes)
end

local function drop(name, list, tokens, bytes)
  redis.call('ZREM', INDEX, name)
  redis.call('HDEL', UNACKED, name)
  redis.call('HDEL', LEASES, name)
  if list ~= '' then count(queue_of(list), 'held:' .. level_of(list), -1, tokens, bytes) end
end

-- What is known of a message from earlier deliveries, once there will be no more.
local function forget_past(name)
  redis.call('HDEL', LOST, tag_in(name))
  redis.call('HDEL', TRIES, tag_in(name))
end

local function delay(list, message, due)
  local name = free_name(DELAYED, tag_of(message))
  redis.call('HSET', DELAYED, name, #list .. ':' .. list .. message)
  redis.call('ZADD', DUE, due, name)
end

-- The same, by whoever holds the message.
local function delay_held(name, token, due)
  local list, tokens, bytes = list_held(name, token)
  delay(list, redis.call('HGET', UNACKED, name), due)
  drop(name, list, tokens, bytes)
end

-- Back to the list that it came from, as the next one or as the last.
local function requeue(name, list, tokens, bytes, as_next)
  local message = redis.call('HGET', UNACKED, name)
  if message then
    -- A key of that name which is no list: the lease runs out, and it becomes a dead letter.
    if type(insert(list, message, as_next)) ~= 'number' then return end
    redis.call('HSETNX', LOST, tag_in(name), 0)
  end
  drop(name, list, tokens, bytes)
end
