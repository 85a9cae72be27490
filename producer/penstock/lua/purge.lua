#!lua flags=allow-oom
-- Drops the next messages of a queue, those of tenants too.
--
-- KEYS: the lists of the queue.
-- ARGV: most messages.
-- Returns how many were dropped, 1 if more are left, then id and `reply_to` of each that names an id.
-- Uses _lists.lua, _counts.lua, _moves.lua.

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
