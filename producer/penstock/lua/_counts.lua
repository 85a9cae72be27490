-- Part: what waits and what is held, counted by jobs, tokens and bytes; after _lists.lua.
--
-- The cost of a message is the property `cost`, tokens, which our senders write; without it, a token for four bytes.
-- What is not marked so, or was put into a list by others, is counted by the list's length.

-- Tokens, bytes, and whether its sender has said the tokens: nothing is free, whatever they said.
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
  if type(shown) ~= 'number' then return end
  if shown > n then
    redis.pcall('LTRIM', key, shown - n, -1)
  end
  while shown < n do
    local ones = {}
    for i = 1, math.min(n - shown, 1000) do ones[i] = '1' end
    if type(redis.pcall('LPUSH', key, unpack(ones))) ~= 'number' then return end
    shown = shown + #ones
  end
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
    is_short = number_in(redis.pcall('LPUSH', key, unpack(ones)), 0) < (seen[queue] or 0)
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

-- What a queue has: jobs, tokens and bytes that wait or are held, and of the tokens those that are computed before
-- a message that comes into this list now. What is not counted is taken for the average of what is held.
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
