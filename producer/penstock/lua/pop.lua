#!lua flags=allow-oom
-- Takes messages out of their lists and leases them to a process.
--
-- KEYS: lists, the most urgent level first, in each level one of every queue.
-- ARGV: see the names below; then how many messages of each queue may be taken; how many tokens of each the process may
-- hold, or ''; of each list the jobs and tokens of it that the process holds.
-- Returns list, tag, leases that ran out or -1, tries, tokens, message; of each that was taken. After MAX_POP_BYTES no
-- more are taken; of a message above MAX_ENTRY_BYTES only its size and its end are told.
-- Uses _lists.lua, _counts.lua, _moves.lua.

local token = ARGV[1]
local lease_end = now() + tonumber(ARGV[2]) -- after so many seconds
local n_left = tonumber(ARGV[3]) -- how many messages may be taken
local suspects = tonumber(ARGV[4]) -- how many suspected poison messages may be taken
local suspect_at = tonumber(ARGV[5]) -- lost leases that make one
local part_taken = tonumber(ARGV[6]) -- 2 to leave half of a list to others who are idle, else 1
local fewest_jobs = tonumber(ARGV[7]) -- that the process may hold, whatever they cost
local n_queues = (#ARGV - 7) / 2 - #KEYS
local first_budget = 7 + n_queues -- before each queue's token budget
local first_held = 7 + 2 * n_queues -- before what is held of each list
local prefetch = {}
for queue = 1, n_queues do prefetch[queue] = tonumber(ARGV[7 + queue]) end
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
  share[base] = share[base] or math.ceil(length_of(base) / part_taken)
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
  of.budget = tonumber(ARGV[first_budget + queue])
  for level = 1, #KEYS / n_queues do
    local at = (level - 1) * n_queues + queue
    of.bases[level] = KEYS[at]
    of.n[level] = tonumber(ARGV[first_held + 2 * at - 1])
    of.tokens[level] = tonumber(ARGV[first_held + 2 * at])
  end
  queues[queue] = of
end

-- What is held of less urgent levels keeps nobody from taking what is urgent.
local function is_full(of, level)
  if not of.budget then return false end
  local n, tokens = 0, 0
  for each = 1, level do n, tokens = n + of.n[each], tokens + of.tokens[each] end
  return n >= fewest_jobs and tokens >= of.budget
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
while any and n_left > 0 and popped_bytes < MAX_POP_BYTES do
  any = false
  for queue = 1, n_queues do
    if n_left > 0 and popped_bytes < MAX_POP_BYTES and prefetch[queue] > 0 then
      if take_one(queues[queue]) then
        any, n_left, prefetch[queue] = true, n_left - 1, prefetch[queue] - 1
      else
        prefetch[queue] = 0
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
