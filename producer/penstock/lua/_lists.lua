-- Part: names of lists, tags and tenants; what is read from them and from a message.
--
-- Tenants and lists are what a sender says they are, so names that are none are refused here: a tenant is one of
-- `penstock.request.TENANT`, and no message goes to a list that other parts of Penstock, Celery or kombu use. A line
-- feed in either would end a line of a lease. Entries above MAX_ENTRY_BYTES do not leave the server.

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
