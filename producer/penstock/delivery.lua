-- How jobs are delivered: every script that touches a message between its sender and its acknowledgement.
--
-- | key | type | holds | touched by | bounded by |
-- | --- | --- | --- | --- | --- |
-- | `<queue>`, `<queue>\x06\x16<3, 6 or 9>` | list | waiting messages, the next one last; kombu's own layout | every sender; workers by `pop` | `max_waiting_jobs`, `_tokens`, `_bytes` of the model, which our clients keep |
-- | `penstock:wake:<list>` | list | a token that wakes an idle worker; for 2 s at most | `push`, whatever refills a list; idle workers by BRPOP | time: 2 s |
-- | `unacked` | hash | tag -> message that a worker holds | these scripts; senders look (HEXISTS) | places of the workers |
-- | `unacked_index` | sorted set | tag -> end of its lease, on this server's clock | these scripts | as `unacked` |
-- | `penstock:leases` | hash | tag -> token of who holds it, the list it came from, its cost in tokens, its bytes; by lines | these scripts | as `unacked` |
-- | `penstock:lost` | hash | tag -> leases that ran out; 0 after a hand-back; gone with the acknowledgement | these scripts | messages there are; 100,000 of those that others removed |
-- | `penstock:tries` | hash | tag -> how often its worker put it off; gone with the acknowledgement | these scripts | as `penstock:lost` |
-- | `penstock:due` | sorted set | tag -> when a delayed message is due, Unix seconds | these scripts | delayed messages, which senders bound |
-- | `penstock:delayed` | hash | tag -> length of the list's name, colon, that name, message | these scripts | as `penstock:due` |
-- | `penstock:dead` | list | JSON of messages that were given up, oldest first | `bury`; people | 10,000, then the oldest goes and is counted |
-- | `penstock:untold` | sorted set | entry of `penstock:dead` whose sender must hear -> when another worker may tell | `bury`, `claim_untold`; workers | 10,000 |
-- | `penstock:sweep` | hash | when leases were last looked through, and from when on they may be taken over; `dropped`: dead letters that had no room | `take_over` | three fields |
-- | `penstock:serial` | string | counter that tells two messages of one tag apart | these scripts | one number |
-- | `<list>\x06\x17<tenant>` | list | waiting messages of one tenant | these scripts | as `<queue>` |
-- | `penstock:turns:<list>` | sorted set | tenant with waiting messages -> tokens it has had, by its share | these scripts | tenants with waiting messages |
-- | `penstock:passed:<list>` | sorted set | the same of tenants without, while others wait | these scripts | tenants who had a turn since the queue was empty, and more of it than others |
-- | `penstock:tenants` | hash | tenant -> its share, and its tokens per second or 0 | workers, by their settings | settings: gone a minute after the last worker that knows the tenant |
-- | `penstock:bucket:tenant:<tenant>` | string | see `bucket.lua` | `push` | time: until it is full, 11 minutes at most |
-- | `penstock:bucket:retries` | string | see `bucket.lua` | `retry`; clients that try again | time: the same |
-- | `penstock:load:<queue>` | hash | level (`+`: of tenants), or `held:<level>` -> jobs, tokens and bytes; `age:<level>` -> tokens that went before it in turn; `turn:<level>` -> where the tenant stood that had the last turn; `spilled` -> jobs that came from another pool | these scripts | fields of four levels; fields of empty lists go |
-- | `penstock:waiting:<queue>` | list | a `1` for each message that waits in all of a queue's lists: its length is how much waits | these scripts; people by LLEN | as the queue |
--
-- A tag is the message's own `delivery_tag`. A token names one pop of one process, so what a process took twice
-- has two tokens: only the last holder acknowledges, renews or hands back.
--
-- The cost of a message is the property `cost`, tokens, which our senders write; without it, a token for four bytes.
-- What is not marked so, or was put into a list by others, is counted by the list's length.
--
-- Tenants and lists are what a sender says they are, so names that are none are refused here: a tenant is one of
-- `penstock.request.TENANT`, and no message goes to a list that other parts of Penstock, Celery or kombu use. A line
-- feed in either would end a line of a lease. Entries above MAX_ENTRY_BYTES do not leave the server.
--
-- Each script begins with a marker line, gets the shared part before it, and runs as a whole. Those marked
-- allow-oom run on a full server too: they are how it becomes less full. Needs Redis 7 or Valkey.

-- script: shared
local UNACKED, INDEX, LEASES = 'unacked', 'unacked_index', 'penstock:leases'
local LOST, TRIES, DUE, DELAYED = 'penstock:lost', 'penstock:tries', 'penstock:due', 'penstock:delayed'
local DEAD, UNTOLD, SWEEP, SERIAL = 'penstock:dead', 'penstock:untold', 'penstock:sweep', 'penstock:serial'
local LOAD, TURNS, PASSED, TENANTS = 'penstock:load:', 'penstock:turns:', 'penstock:passed:', 'penstock:tenants'
local WAITING = 'penstock:waiting:'
local MOST_DEAD, MOST_PAST = 10000, 100000
local LEVELS = {'0', '3', '6', '9'}

local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- What the name of a list says: its queue, its level, the list of that level, and the tenant whose part of it this is, ''
-- for those that name none. Worked out once: names are asked for several times for each message.
local places = {}
local function place_of(list)
  local place = places[list]
  if not place then
    place = {queue = list, level = '0', base = list, tenant = ''}
    if string.find(list, '\6', 1, true) then
      place.queue, place.level = string.match(list, '^[^\6]*'), string.match(list, '\6\22(%d)') or '0'
      local base, tenant = string.match(list, '^(.-)\6\23(.*)$')
      place.base, place.tenant = base or list, tenant or ''
    end
    places[list] = place
  end
  return place
end

local function queue_of(list) return place_of(list).queue end
local function level_of(list) return place_of(list).level end

local function split(list)
  local place = place_of(list)
  return place.base, place.tenant
end

-- One token is enough: a token that lies there means that nobody waits, and whoever takes it and leaves messages
-- wakes the next. Idle workers look for themselves every second, so older tokens serve nobody.
local woken = {}
local function wake(list)
  local key = 'penstock:wake:' .. place_of(list).base
  if woken[key] then return end
  woken[key] = true
  local left_ms = redis.call('PTTL', key)
  if left_ms == -2 then redis.call('LPUSH', key, '1') end
  if left_ms < 1000 then redis.call('PEXPIRE', key, 2000) end
end

-- kombu writes the properties last. Inside a JSON string its quotes would be escaped, so text cannot pose as it.
local function tag_of(message)
  local pattern = '"delivery_tag"%s*:%s*"([^"\\%c]+)"'
  return string.match(string.sub(message, -512), pattern) or string.match(message, pattern) or redis.sha1hex(message)
end

-- Two messages of one tag are two messages: the second goes under the tag, newline, a number.
local function free_name(hash, tag)
  local name = tag
  while redis.call('HEXISTS', hash, name) == 1 do
    name = tag .. '\n' .. redis.call('INCR', SERIAL)
  end
  return name
end

-- What a field says, if it is a number that can be counted with: senders may write there.
local function number_in(text, default)
  local number = tonumber(text)
  if not number or number ~= number or math.abs(number) == math.huge then return default end
  return number
end

local function tag_in(name) return string.match(name, '^[^\n]*') end

-- As `penstock.request.TENANT` has it.
local function is_tenant(name) return #name <= 64 and string.match(name, '^%w[%w._@-]*$') ~= nil end

-- Whether messages may lie in a list: it is no key of somebody else, and its tenant, if it names one, is one.
local function is_allowed(list)
  if string.find(list, '^[cg]pu%.[^%c]+\6?\22?[369]?$') then return true end -- of no tenant, as nearly all are
  local base, tenant = split(list)
  local queue = string.gsub(base, '\6\22[369]$', '')
  if string.find(queue, '%c') or (base ~= list and not is_tenant(tenant)) then return false end
  for _, foreign in ipairs({'^penstock:', '^unacked$', '^unacked_', '^celery%-task%-meta%-', '^_kombu%.'}) do
    if string.find(queue, foreign) then return false end
  end
  return true
end

local function is_queue(list)
  local place = place_of(list)
  if place.is_queue == nil then place.is_queue = is_allowed(list) end
  return place.is_queue
end

-- A message as a worker gets it: of one that is too large its size and its end, where its sender stands.
local function as_told(message)
  if #message <= MAX_ENTRY_BYTES then return message end
  return '\0' .. #message .. '\n' .. string.sub(message, -16384)
end

local function part_of(base, tenant) return tenant == '' and base or base .. '\6\23' .. tenant end

-- Share, and tokens per second that a tenant may send, 0 if there is no limit.
local function terms_of(tenant)
  local share, rate = string.match(redis.call('HGET', TENANTS, tenant) or '', '^(%S+) (%S+)$')
  share, rate = number_in(share, 1), number_in(rate, 0)
  return share > 0 and share or 1, rate
end

-- kombu's name of a level's list.
local function list_of(queue, level) return level == '0' and queue or queue .. '\6\22' .. level end

-- Tokens, bytes, and whether its sender has said the tokens: nothing is free, whatever he said.
local costs = {}
local function cost_of(message)
  local cost = costs[message]
  if not cost then
    local tokens = string.match(string.sub(message, -512), '"cost"%s*:%s*(%d+)')
    local n = tonumber(tokens) or math.ceil(#message / 4)
    cost = {tokens = math.min(math.max(n, math.floor(#message / 4096), 1), 1e9), is_told = tokens ~= nil}
    costs[message] = cost
  end
  return cost.tokens, #message, cost.is_told
end

-- Jobs, tokens and bytes, as they stand in a field of the load.
local function read_sum(text)
  local n, t, b = string.match(text or '', '^(%d+) (%d+) (%d+)$')
  return tonumber(n) or 0, tonumber(t) or 0, tonumber(b) or 0
end

-- What moves is noted here and written by `settle`, once for each script that runs.
local moved = {}

local function note(queue, what)
  moved[queue] = moved[queue] or {}
  moved[queue][what] = moved[queue][what] or {n = 0, t = 0, b = 0}
  return moved[queue][what]
end

local function count(queue, what, n, tokens, bytes)
  local sum = note(queue, what)
  sum.n, sum.t, sum.b = sum.n + n, sum.t + n * tokens, sum.b + n * bytes
end

-- An empty list holds nothing, whatever was counted: others may have emptied it.
local function forget(queue, what)
  local sum = note(queue, what)
  sum.is_new, sum.n, sum.t, sum.b = true, 0, 0, 0
end

-- One number that says how much waits, for people and autoscalers: the length of a list. Here it becomes what the lists
-- hold. Who may not write it leaves it to the next one who may.
local function show_anew(queue)
  local n, tenants = 0, redis.call('HMGET', LOAD .. queue, '0+', '3+', '6+', '9+')
  for i, each in ipairs(LEVELS) do
    local length = redis.pcall('LLEN', list_of(queue, each))
    n = n + (type(length) == 'number' and length or 0) + (read_sum(tenants[i]))
  end
  local key = WAITING .. queue
  local shown = redis.pcall('LLEN', key)
  if type(shown) ~= 'number' then return n end
  if shown > n then
    redis.pcall('LTRIM', key, shown - n, -1)
  end
  while shown < n do
    local ones = {}
    for i = 1, math.min(n - shown, 1000) do ones[i] = '1' end
    if type(redis.pcall('LPUSH', key, unpack(ones))) ~= 'number' then return n end
    shown = shown + #ones
  end
  return n
end

local shown = {} -- queue -> by how much more its number is to say, or 'anew'
local seen = {} -- queue -> how much waits in one of its lists at least

-- Moves the number. What others put there or took shows where it ends, and is counted anew then; a worker that finds
-- nothing to take, and `recount`, count anew anyway.
local function show_change(queue, change)
  local key, is_short = WAITING .. queue, true
  if change > 0 and change < 1000 then
    local ones = {}
    for i = 1, change do ones[i] = '1' end
    is_short = (number_in(redis.pcall('LPUSH', key, unpack(ones)), 0)) < (seen[queue] or 0)
  elseif change < 0 and change > -1000 then
    local gone = redis.pcall('RPOP', key, -change)
    is_short = type(gone) ~= 'table' or #gone < -change
  end
  if is_short then show_anew(queue) end
end

local function settle()
  for queue, sums in pairs(moved) do
    local names, full, empty = {}, {}, {}
    for what in pairs(sums) do names[#names + 1] = what end
    local before = redis.call('HMGET', LOAD .. queue, unpack(names))
    for i, what in ipairs(names) do
      local sum = sums[what]
      local n, t, b = read_sum(not sum.is_new and before[i] or '')
      if n + sum.n > 0 then
        full[#full + 1] = what
        full[#full + 1] = string.format('%.0f %.0f %.0f', n + sum.n, math.max(t + sum.t, 0), math.max(b + sum.b, 0))
      elseif before[i] then
        empty[#empty + 1] = what
      end
    end
    if #full > 0 then redis.call('HSET', LOAD .. queue, unpack(full)) end
    if #empty > 0 then redis.call('HDEL', LOAD .. queue, unpack(empty)) end
  end
  for queue, change in pairs(shown) do
    if change == 'anew' then show_anew(queue) elseif change ~= 0 then show_change(queue, change) end
  end
  moved, shown, seen = {}, {}, {}
end

-- Tenants take turns: who has had least goes first, what is taken counts by share. Who comes is put where the message
-- stood that was taken last, but not before what he has had already: Start-time Fair Queuing, Goyal et al. 1996, section 3.
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

local function tally(list, n, message)
  local tokens, bytes, is_marked = cost_of(message)
  if select(2, split(list)) ~= '' then
    count(queue_of(list), level_of(list) .. '+', n, tokens, bytes)
    count(list, 'own', n, tokens, bytes)
  elseif is_marked then
    count(queue_of(list), level_of(list), n, tokens, bytes)
  end
  return tokens
end

-- Other lists are no queues of models: answers to `celery inspect` come and go.
local function show(list, change)
  local queue = queue_of(list)
  if not string.find(queue, '^[cg]pu%.') then return end
  shown[queue] = shown[queue] ~= 'anew' and change and (shown[queue] or 0) + change or 'anew'
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

-- Among the delayed ones, by whoever holds it.
local function put_off(name, token, due)
  local list, tokens, bytes = list_held(name, token)
  delay(list, redis.call('HGET', UNACKED, name), due)
  drop(name, list, tokens, bytes)
end

-- Back to where it came from, as the next one or as the last.
local function put_back(name, list, tokens, bytes, as_next)
  local message = redis.call('HGET', UNACKED, name)
  if message then
    -- A key of that name which is no list: the lease runs out, and it becomes a dead letter.
    if type(insert(list, message, as_next)) ~= 'number' then return end
    redis.call('HSETNX', LOST, tag_in(name), 0)
  end
  drop(name, list, tokens, bytes)
end

-- What a queue has: jobs, tokens and bytes that wait or are held, and of the tokens those that are computed before
-- a message that comes into this list now. What is not counted is taken for like what is held.
local function load_of(list)
  local queue, level, base, tenant = queue_of(list), level_of(list), split(list)
  local fields = redis.call('HMGET', LOAD .. queue, '0', '3', '6', '9', '0+', '3+', '6+', '9+',
    'held:0', 'held:3', 'held:6', 'held:9')
  local n, t, b, ahead = 0, 0, 0, 0
  for i, each in ipairs(LEVELS) do
    local held_n, held_t, held_b = read_sum(fields[i + 8])
    n, t, b = n + held_n, t + held_t, b + held_b
    if each <= level then ahead = ahead + held_t end
  end
  local plain_t, plain_b = n > 0 and t / n or 256, n > 0 and b / n or 1024
  for i, each in ipairs(LEVELS) do
    local length = redis.pcall('LLEN', list_of(queue, each))
    if type(length) ~= 'number' then length = 0 end
    local tokens = 0
    if length > 0 then
      local counted_n, counted_t, counted_b = read_sum(fields[i])
      local plain_n = math.max(length - counted_n, 0)
      tokens = plain_n * plain_t + counted_t
      n, t, b = n + length, t + tokens, b + plain_n * plain_b + counted_b
    end
    local tenants_n, tenants_t, tenants_b = read_sum(fields[i + 4])
    n, t, b = n + tenants_n, t + tenants_t, b + tenants_b
    if each < level then ahead = ahead + tokens + tenants_t end
    if each == level then
      local all = tokens + tenants_t
      if tenant ~= '' or tenants_n > 0 then
        -- Before a tenant's last message goes what it has waiting itself, and of the others as much by their shares,
        -- which are taken for 1.
        local own = tokens
        if tenant ~= '' then own = select(2, read_sum(redis.call('HGET', LOAD .. list, 'own'))) end
        local others = redis.call('ZCARD', TURNS .. base)
        if redis.call('ZSCORE', TURNS .. base, tenant) then others = others - 1 end
        if tenant ~= '' and length > 0 and not redis.call('ZSCORE', TURNS .. base, '') then others = others + 1 end
        all = math.min(all, own * (1 + others / terms_of(tenant)))
      end
      ahead = ahead + all
    end
  end
  return n, t, b, ahead
end

-- script: push
-- KEYS: the list. ARGV: most jobs, tokens and bytes that the queue may have, tokens per second that its workers do,
-- seconds that a message may wait; each may be ''. Then, of each message: itself, when it is due in Unix seconds or ''.
-- Returns how many wait in the list; 0 if the last message is delayed. All messages are queued or none: if none,
-- seconds until it is worth asking again, the predicted wait in seconds or '', and what is exceeded.
if not is_queue(KEYS[1]) then return redis.error_reply('ERR no queue has this name') end
local limits, speed, most_s = {tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])}, tonumber(ARGV[4]), tonumber(ARGV[5])
if limits[1] or limits[2] or limits[3] or (speed and most_s) then
  local sums, last_tokens = {0, 0, 0}, 0
  for i = 6, #ARGV, 2 do
    local tokens, bytes = cost_of(ARGV[i])
    sums, last_tokens = {sums[1] + 1, sums[2] + tokens, sums[3] + bytes}, tokens
  end
  local n, t, b, ahead = load_of(KEYS[1])
  local wait = speed and ahead / speed
  local wait_of_last = speed and (ahead + sums[2] - last_tokens) / speed
  -- How long until the queue has worked off what is too much, and which limit takes longest.
  local retry, exceeded = -1, ''
  for i, has in ipairs({n, t, b}) do
    -- An empty queue takes anything: else what is larger than a limit would come again for ever.
    if limits[i] and n > 0 and has + sums[i] > limits[i] then
      local seconds = speed and math.min(has + sums[i] - limits[i], has) / has * t / speed or 1
      if seconds > retry then retry, exceeded = seconds, ({'jobs', 'tokens', 'bytes'})[i] end
    end
  end
  if most_s and n > 0 and wait_of_last and wait_of_last > most_s and wait_of_last - most_s > retry then
    retry, exceeded = wait_of_last - most_s, 'deadline'
  end
  if exceeded ~= '' then
    return {string.format('%.3f', retry), wait and string.format('%.3f', wait) or '', exceeded}
  end
end
local base, tenant = split(KEYS[1])
if tenant ~= '' then
  local _, rate = terms_of(tenant)
  if rate > 0 then
    local tokens = 0
    for i = 6, #ARGV, 2 do tokens = tokens + cost_of(ARGV[i]) end
    local taken = take({'penstock:bucket:tenant:' .. tenant}, {0, rate, 60 * rate, tokens}, 1)
    if taken[1] == 0 then return {taken[2], '', 'rate'} end
  end
end
local n_waiting
for i = 6, #ARGV, 2 do
  local due = tonumber(ARGV[i + 1])
  if due and due > now() then
    delay(KEYS[1], ARGV[i], due)
    n_waiting = 0
  else
    n_waiting = insert(KEYS[1], ARGV[i], false)
    if type(n_waiting) ~= 'number' then break end
  end
end
settle()
return n_waiting

-- script: pop allow-oom
-- KEYS: lists, the most urgent level first, in each level one of every queue.
-- ARGV: token, lease in seconds, most messages, how many suspects, lost leases that make one, 2 to take at most half of a
-- list and leave the rest to others who are idle (else 1), how many jobs the process may hold whatever they cost; then
-- the credits of each queue; of each the tokens that the process may hold, or ''; of each list the jobs and tokens of it
-- that the process holds.
-- Returns list, tag, leases that ran out or -1, tries, tokens, message; of each that was taken. After MAX_POP_BYTES no
-- more are taken; of a message above MAX_ENTRY_BYTES only its size and its end are told.
local token, lease_end = ARGV[1], now() + tonumber(ARGV[2])
local room, suspects, suspect_at = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local credits, n_queues = {}, (#ARGV - 7) / 2 - #KEYS
for queue = 1, n_queues do credits[queue] = tonumber(ARGV[7 + queue]) end
local taken, share, fair = {}, {}, {}
local popped_bytes = 0

-- The part of a level whose turn it is.
local function next_part(base)
  if fair[base] == nil then
    fair[base] = redis.call('EXISTS', TURNS .. base) == 1
    if fair[base] and redis.call('EXISTS', base) == 1 then enter(base, '') end
  end
  local tenant = fair[base] and redis.call('ZRANGE', TURNS .. base, 0, 0)[1] or ''
  if tenant == '' or is_tenant(tenant) then return tenant end
  redis.call('ZREM', TURNS .. base, tenant) -- written there by hand
  fair[base] = nil
  return next_part(base)
end

local function length_of(base)
  local length = redis.pcall('LLEN', base)
  if type(length) ~= 'number' then length = 1 end
  local tenants = fair[base] and redis.call('HGET', LOAD .. queue_of(base), level_of(base) .. '+')
  return length + read_sum(tenants)
end

-- Read first and removed last: an error in between leaves the message where it was.
-- Returns the tokens of what was taken; false if there is nothing to take.
local function take(base)
  local tenant = next_part(base)
  local list = part_of(base, tenant)
  share[base] = share[base] or math.ceil(length_of(base) / tonumber(ARGV[6]))
  local message = redis.pcall('LINDEX', list, -1)
  if type(message) ~= 'string' then
    if not (fair[base] and redis.call('ZSCORE', TURNS .. base, tenant)) then return false end
    leave(base, tenant) -- others have emptied it
    return take(base)
  end
  if share[base] <= 0 then return false end
  local tag = tag_of(message)
  local lost = number_in(redis.call('HGET', LOST, tag) or -1, 0)
  if lost >= suspect_at then
    if suspects == 0 then return false end
    suspects = suspects - 1
  end
  local name = free_name(UNACKED, tag)
  hold(name, message, token, list, lease_end)
  local tokens, is_empty = remove(list, message)
  share[base] = share[base] - 1
  if fair[base] then
    local cost = tokens / terms_of(tenant)
    local after = tonumber(redis.call('ZINCRBY', TURNS .. base, cost, tenant))
    redis.call('HSET', LOAD .. queue_of(base), 'turn:' .. level_of(base), string.format('%.17g', after - cost))
    if is_empty then leave(base, tenant) end
  end
  local tries = number_in(redis.call('HGET', TRIES, tag), 0)
  popped_bytes = popped_bytes + math.min(#message, MAX_ENTRY_BYTES)
  for _, field in ipairs({list, name, lost, tries, tokens, as_told(message)}) do taken[#taken + 1] = field end
  return tokens
end

-- Levels of one queue. A more urgent one goes first, but of eight tokens one is for each level that waits behind it:
-- `ages` are the tokens that are due to it so, and once they reach AGE it has its turn.
local AGE, PART = 1000, 1 / 8
local queues = {}
for queue = 1, n_queues do
  local of = {bases = {}, n = {}, tokens = {}, closed = {}, touched = {}, full = {}}
  of.most = tonumber(ARGV[7 + n_queues + queue])
  for level = 1, #KEYS / n_queues do
    local at = (level - 1) * n_queues + queue
    of.bases[level] = KEYS[at]
    of.n[level] = tonumber(ARGV[6 + 2 * n_queues + 2 * at])
    of.tokens[level] = tonumber(ARGV[7 + 2 * n_queues + 2 * at])
  end
  queues[queue] = of
end

-- What is held of less urgent levels keeps nobody from taking what is urgent.
local function is_full(of, level)
  if not of.most then return false end
  local n, tokens = 0, 0
  for each = 1, level do n, tokens = n + of.n[each], tokens + of.tokens[each] end
  return n >= tonumber(ARGV[7]) and tokens >= of.most
end

local function keys_of(of)
  local keys = {}
  for _, base in ipairs(of.bases) do
    keys[#keys + 1] = base
    keys[#keys + 1] = TURNS .. base
  end
  return keys
end

local function is_anything_of(of)
  return redis.call('EXISTS', WAITING .. queue_of(of.bases[1]), unpack(keys_of(of))) > 0
end

local function read_ages(of)
  of.ages = {}
  if #of.bases == 1 or redis.call('EXISTS', unpack(keys_of(of), 3)) == 0 then return end
  for level = 2, #of.bases do
    local base = of.bases[level]
    if redis.call('EXISTS', base, TURNS .. base) > 0 then
      of.ages[level] = number_in(redis.call('HGET', LOAD .. queue_of(base), 'age:' .. level_of(base)), 0)
    end
  end
end

-- Take one message of a queue; false if there is none to take.
local function take_one(of)
  if not of.ages then read_ages(of) end
  local order = {}
  for level = #of.bases, 2, -1 do
    if (of.ages[level] or 0) >= AGE then order[#order + 1] = level end
  end
  for level = 1, #of.bases do order[#order + 1] = level end
  for place, level in ipairs(order) do
    local base = of.bases[level]
    of.full[level] = is_full(of, level)
    local tokens = not of.closed[level] and not of.full[level] and take(base)
    if tokens then
      of.touched[level] = true
      of.n[level], of.tokens[level] = of.n[level] + 1, of.tokens[level] + tokens
      for other in pairs(of.ages) do
        if other > level then of.ages[other] = of.ages[other] + PART * tokens end
      end
      if of.ages[level] then of.ages[level] = place <= #order - #of.bases and of.ages[level] - tokens or 0 end
      return true
    end
    of.closed[level] = true
    -- What is left is for others, and goes before what is less urgent.
    if of.touched[level] and redis.call('EXISTS', base, TURNS .. base) > 0 then return false end
  end
  return false
end

local any = true
while any and room > 0 and popped_bytes < MAX_POP_BYTES do
  any = false
  for queue = 1, n_queues do
    if room > 0 and popped_bytes < MAX_POP_BYTES and credits[queue] > 0 then
      if take_one(queues[queue]) then
        any, room, credits[queue] = true, room - 1, credits[queue] - 1
      else
        credits[queue] = 0
      end
    end
  end
end
for _, of in ipairs(queues) do
  for level, base in ipairs(of.bases) do
    local is_seen = of.touched[level] or of.full[level]
    local is_left = (is_seen or of.ages and of.ages[level]) and redis.call('EXISTS', base, TURNS .. base) > 0
    if is_seen and is_left then wake(base) end -- one that is idle
    if next(of.touched) and of.ages[level] and is_left then
      redis.call('HSET', LOAD .. queue_of(base), 'age:' .. level_of(base), string.format('%.0f', of.ages[level]))
    end
  end
end
for queue, of in ipairs(queues) do
  -- Others may have put messages there, or taken them.
  if not next(of.touched) and is_anything_of(of) then show(KEYS[queue]) end
end
settle()
return taken

-- script: ack allow-oom
-- ARGV: tag, token; of each.
-- Returns the tags that the token does not hold: others have taken them over.
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

-- script: renew allow-oom
-- ARGV: lease in seconds, then tag, token; of each.
-- Returns the tags that the token does not hold.
local lease_end, theirs = now() + tonumber(ARGV[1]), {}
for i = 2, #ARGV, 2 do
  if list_held(ARGV[i], ARGV[i + 1]) then
    redis.call('ZADD', INDEX, lease_end, ARGV[i])
  else
    theirs[#theirs + 1] = ARGV[i]
  end
end
return theirs

-- script: hand_back allow-oom
-- ARGV: 1 to be the next ones in their lists, 0 the last, then tag, token; of each. Counts no lost lease.
for i = 2, #ARGV, 2 do
  local list, tokens, bytes = list_held(ARGV[i], ARGV[i + 1])
  if list then put_back(ARGV[i], list, tokens, bytes, ARGV[1] == '1') end
end
settle()

-- script: fail allow-oom
-- ARGV: tag, token, most deliveries. Hands back a message whose worker failed on it, as the last one; that counts as a
-- lease that ran out. Returns nothing if it went back, else its list, how often it was delivered, and the message: the
-- caller still holds it, and must bury it.
local name = ARGV[1]
local list, tokens, bytes = list_held(name, ARGV[2])
if not list then return {} end
local lost = number_in(redis.call('HGET', LOST, tag_in(name)), 0) + 1
redis.call('HSET', LOST, tag_in(name), lost)
local message = redis.call('HGET', UNACKED, name)
if message and lost >= tonumber(ARGV[3]) then return {list, lost, as_told(message)} end
if message then put_back(name, list, tokens, bytes, false) end
settle()
return {}

-- script: reclaim allow-oom
-- ARGV: token of a pop whose reply never arrived. Hands back what it took.
local leases = redis.call('HGETALL', LEASES)
for i = 1, #leases, 2 do
  local list, tokens, bytes = list_held(leases[i], ARGV[1])
  if list then put_back(leases[i], list, tokens, bytes, true) end
end
settle()

-- script: postpone allow-oom
-- ARGV: tag, token, when it is due. For a message that a foreign sender put in its list before it was due.
if list_held(ARGV[1], ARGV[2]) then put_off(ARGV[1], ARGV[2], tonumber(ARGV[3])) end
settle()

-- script: retry allow-oom
-- KEYS: the bucket of what all may try again. ARGV: tag, token, seconds until it is worth another try, then the bucket's
-- rate and burst. Waits for its share of the bucket too.
if list_held(ARGV[1], ARGV[2]) then
  local taken = take(KEYS, {math.huge, tonumber(ARGV[4]), tonumber(ARGV[5]), 1}, 1)
  put_off(ARGV[1], ARGV[2], now() + tonumber(ARGV[3]) + tonumber(taken[2]))
  redis.call('HINCRBY', TRIES, tag_in(ARGV[1]), 1)
end
settle()

-- script: move_due allow-oom
-- ARGV: most messages. The earliest becomes the next one in its list.
-- Returns how many were moved, and milliseconds until the next is due or -1. What names a list that is no queue is
-- dropped: nobody but its sender can have meant it.
local names = redis.call('ZRANGEBYSCORE', DUE, '-inf', now(), 'LIMIT', 0, tonumber(ARGV[1]))
for i = #names, 1, -1 do
  local entry = redis.call('HGET', DELAYED, names[i])
  local digits = string.match(entry or '0:', '^(%d+):')
  local is_moved = not entry
  if entry and digits then
    local list_end = #digits + 1 + tonumber(digits)
    local list = string.sub(entry, #digits + 2, list_end)
    is_moved = not is_queue(list) or type(insert(list, string.sub(entry, list_end + 1), true)) == 'number'
  end
  if is_moved then
    redis.call('HDEL', DELAYED, names[i])
    redis.call('ZREM', DUE, names[i])
  else
    redis.call('ZADD', DUE, now() + 60, names[i]) -- its list is none: the others must not wait for it
  end
end
settle()
local first = redis.call('ZRANGE', DUE, 0, 0, 'WITHSCORES')
local wait_ms = -1
if first[2] then wait_ms = math.max(0, math.ceil((tonumber(first[2]) - now()) * 1000)) end
return {#names, wait_ms}

-- script: take_over allow-oom
-- ARGV: lease in seconds, most deliveries, most messages, token of the caller.
-- Leases that ran out: the message becomes the next one in its list. After the last delivery, or if it cannot go
-- back, the caller holds it and must bury it.
-- Returns how many leases ran out; then list, tag, deliveries, message of each that is to be buried.
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

-- script: bury allow-oom
-- ARGV: tag, token, JSON object without `at`, 1 if its sender must hear of it, seconds until another may tell.
-- Returns the entry of the dead-letter list, or nil if the token does not hold the message.
local list, tokens, bytes = list_held(ARGV[1], ARGV[2])
if not list then return false end
local entry = string.sub(ARGV[3], 1, -2) .. string.format(',"at":%.6f}', now())
local n_dead = redis.call('RPUSH', DEAD, entry)
if n_dead > MOST_DEAD then
  redis.call('LTRIM', DEAD, n_dead - MOST_DEAD, -1)
  redis.call('HINCRBY', SWEEP, 'dropped', n_dead - MOST_DEAD)
end
if ARGV[4] == '1' then
  redis.call('ZADD', UNTOLD, now() + tonumber(ARGV[5]), entry)
  redis.call('ZREMRANGEBYRANK', UNTOLD, 0, -1 - MOST_DEAD)
end
drop(ARGV[1], list, tokens, bytes)
forget_past(ARGV[1])
settle()
return entry

-- script: revive
-- ARGV: entry of the dead-letter list, its message, the list it goes to, token, lease in seconds.
-- The caller holds the message then, and hands it back. Returns its tag, or nil if the entry is gone.
if redis.call('LREM', DEAD, 1, ARGV[1]) == 0 then return false end
redis.call('ZREM', UNTOLD, ARGV[1])
local name = free_name(UNACKED, tag_of(ARGV[2]))
hold(name, ARGV[2], ARGV[4], ARGV[3], now() + tonumber(ARGV[5]))
settle()
return name

-- script: claim_untold allow-oom
-- ARGV: seconds until another may tell, most entries.
-- Returns entries whose teller did not finish; the caller tells.
local entries = redis.call('ZRANGEBYSCORE', UNTOLD, '-inf', now(), 'LIMIT', 0, tonumber(ARGV[2]))
for _, entry in ipairs(entries) do redis.call('ZADD', UNTOLD, now() + tonumber(ARGV[1]), entry) end
return entries

-- script: nudge allow-oom
-- ARGV: process. Wakes its wait: a place has become free that it did not wait for.
wake(ARGV[1])

-- script: load allow-oom
-- KEYS: a list. Returns jobs, tokens and bytes of its queue, and the tokens before a message that comes now.
local n, t, b, ahead = load_of(KEYS[1])
show_anew(queue_of(KEYS[1]))
return {n, math.ceil(t), math.ceil(b), math.ceil(ahead)}

-- script: recount allow-oom
-- KEYS: the plain lists of queues. Counts anew what is held of them, so that nothing stays that was counted wrong.
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

-- script: purge allow-oom
-- KEYS: the lists of a queue. ARGV: most messages. Drops the next messages, those of tenants too.
-- Returns how many were dropped, 1 if more are left, then id and `reply_to` of each that names an id.
local most, n, bytes, told = tonumber(ARGV[1]), 0, 0, {}

local function note_caller(message)
  local is_json, envelope = pcall(cjson.decode, message)
  if not is_json or type(envelope) ~= 'table' or type(envelope.headers) ~= 'table' then return end
  local id, properties = envelope.headers.id, envelope.properties
  local reply_to = type(properties) == 'table' and properties.reply_to
  if type(id) == 'string' then
    told[#told + 1] = id
    told[#told + 1] = type(reply_to) == 'string' and reply_to or ''
  end
end

local function drop_from(list)
  local message = redis.pcall('LINDEX', list, -1)
  while type(message) == 'string' do
    if n >= most or bytes >= MAX_POP_BYTES then return false end
    n, bytes = n + 1, bytes + #message
    note_caller(message)
    remove(list, message)
    forget_past(tag_of(message))
    message = redis.pcall('LINDEX', list, -1)
  end
  return true
end

local is_left = false
for _, base in ipairs(KEYS) do
  local is_empty = drop_from(base)
  for _, tenant in ipairs(redis.call('ZRANGE', TURNS .. base, 0, -1)) do
    local list = part_of(base, tenant)
    if tenant ~= '' and drop_from(list) then
      leave(base, tenant)
      settle()
      redis.call('DEL', LOAD .. list)
    elseif tenant ~= '' then
      is_empty = false
    end
  end
  settle()
  if is_empty then
    redis.call('DEL', TURNS .. base, PASSED .. base)
    redis.call('HDEL', LOAD .. queue_of(base), level_of(base), level_of(base) .. '+', 'age:' .. level_of(base), 'turn:' .. level_of(base))
  end
  is_left = is_left or not is_empty
  show(base)
end
settle()
return {n, is_left and 1 or 0, unpack(told)}
