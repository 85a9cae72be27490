-- A sign of life, and with it whatever workers write once: who serves what must survive a server that forgets.
--
-- An entry is `results`, `model:<name>` or `tenant:<name>`. It has a version: when its worker became ready, later
-- than every version before. Entries of the latest stay; what is gone, or older, is written again by whoever has
-- a later one, so after a loss all come back, and workers of two settings do not write in turn.
--
-- Redis' clock, not the workers': theirs may differ.
-- KEYS: workers, models, results, tenants, announced; then the tables of Celery's exchanges of the worker's queues.
-- ARGV: worker id, WorkerInfo, the worker's version (0 before it is ready, `new` when it becomes so); then of each
-- entry: its name, the bytes of its value or '' if others serve it, the value or '' to be asked for it.
-- Returns the time, the version, and whether values are asked for.

local workers, models, results, tenants, announced = unpack(KEYS, 1, 5)
local ALIVE_S, GONE_S, MOST_SILENT = 15, 600, 100
local TOUCH_S, SWEEP_S, TENANT_S, FORGOTTEN_S = 5, 10, 60, 604800
local time = redis.call('TIME')
local now = tonumber(time[1])
redis.call('HSET', workers, ARGV[1], time[1] .. '\n' .. ARGV[2])

-- Without them a sender of Celery's own, which has declared its queue long ago, loses messages in silence.
for i = 6, #KEYS do
  local queue = string.match(KEYS[i], '^_kombu%.binding_?%l*%.(.*)$')
  redis.call('SADD', KEYS[i], queue .. '\6\22\6\22' .. queue)
end

local function place_of(entry)
  local kind, name = string.match(entry, '^(%l+):(.*)$')
  if kind == 'model' then return models, name end
  if kind == 'tenant' then return tenants, name end
  return results
end

local function bytes_in(entry)
  local key, field = place_of(entry)
  return field and redis.call('HSTRLEN', key, field) or redis.call('STRLEN', key)
end

local function read(text)
  local version, seen = string.match(text or '', '^(%d+) (%d+)$')
  return tonumber(version) or 0, tonumber(seen) or 0
end

local function note(entry, version)
  redis.call('HSET', announced, entry, string.format('%.0f %.0f', version, now))
end

local names = {}
for i = 4, #ARGV, 3 do names[#names + 1] = ARGV[i] end
local stored = {}
for first = 1, #names, 1000 do -- a call takes 8,000 arguments at most
  local last = math.min(first + 999, #names)
  for _, text in ipairs(redis.call('HMGET', announced, unpack(names, first, last))) do stored[#stored + 1] = text end
end
local version = tonumber(ARGV[3])
if not version then
  version = now * 1000
  for n in ipairs(names) do version = math.max(version, read(stored[n]) + 1) end
end
local is_asked = 0
for n, entry in ipairs(names) do
  local bytes, value = tonumber(ARGV[3 * n + 2]), ARGV[3 * n + 3]
  local was, seen = read(stored[n])
  local has = bytes_in(entry)
  if bytes and version > 0 and (has == 0 or was < version or (was == version and has ~= bytes)) then
    local key, field = place_of(entry)
    if value == '' then
      is_asked = 1
    else
      if field then redis.call('HSET', key, field, value) else redis.call('SET', key, value) end
      note(entry, version)
    end
  elseif has > 0 and math.abs(now - seen) > TOUCH_S then
    note(entry, was)
  end
end

-- Now and then, one of all workers: what nobody has seen for long goes.
if math.abs(now - (tonumber(redis.call('HGET', announced, 'swept')) or 0)) < SWEEP_S then
  return {time[1], time[2], string.format('%.0f', version), is_asked}
end
redis.call('HSET', announced, 'swept', now)
local silent, served, known = {}, {}, {swept = true}
local beats = redis.call('HGETALL', workers)
for i = 1, #beats, 2 do
  local second, text = string.match(beats[i + 1], '^(%d+)%.?%d*\n(.*)$')
  local age = second and now - tonumber(second)
  if not age or age > GONE_S or age < -ALIVE_S then
    redis.call('HDEL', workers, beats[i])
  elseif age > ALIVE_S then
    silent[#silent + 1] = {age, beats[i]}
  else -- of an earlier version, it does not say what it has seen
    local is_json, worker = pcall(cjson.decode, text)
    local found = is_json and type(worker) == 'table' and worker.models
    for _, name in ipairs(type(found) == 'table' and found or {}) do served['model:' .. tostring(name)] = true end
  end
end
table.sort(silent, function(one, other) return one[1] < other[1] end)
for i = MOST_SILENT + 1, #silent do redis.call('HDEL', workers, silent[i][2]) end
local all = redis.call('HGETALL', announced)
for i = 1, #all, 2 do
  local entry = all[i]
  local was, seen = read(all[i + 1])
  local key, field = place_of(entry)
  known[entry] = true
  if served[entry] or seen > now + ALIVE_S then
    note(entry, was)
  elseif field then
    local most_s = key == tenants and was > 0 and TENANT_S or FORGOTTEN_S
    if now - seen > most_s then
      redis.call('HDEL', key, field)
      redis.call('HDEL', announced, entry)
    end
  elseif entry ~= 'results' and entry ~= 'swept' then
    redis.call('HDEL', announced, entry)
  end
end
for kind, key in pairs({model = models, tenant = tenants}) do
  for _, name in ipairs(redis.call('HKEYS', key)) do
    if not known[kind .. ':' .. name] then note(kind .. ':' .. name, 0) end
  end
end
return {time[1], time[2], string.format('%.0f', version), is_asked}
