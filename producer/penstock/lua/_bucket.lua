-- Part: token buckets on Redis's clock, so that every process of a cluster takes from the same allowance.
--
-- A bucket is a string: the second at which it will be full again (GCRA's theoretical arrival time). No key is a
-- full bucket, so an idle one takes no memory, and a change of rate or burst needs no migration.
--
-- Source: the generic cell rate algorithm, ITU-T I.371, annex A, in its virtual scheduling form.

local function now_s()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- No bucket is overdrawn by more seconds than this, whatever stands in its key: others may write there.
local MOST_DEBT_S = 600

-- When a bucket will be full; at once where its key holds no number.
local function full_at(key, rate, burst, now)
  local full = tonumber(redis.pcall('GET', key)) or 0
  local most = now + burst / rate + MOST_DEBT_S
  if full ~= full then return 0 end
  if full > most then
    redis.call('SET', key, string.format('%.6f', most), 'PX', math.ceil((most - now) * 1000))
    return most
  end
  return full
end

-- Take from all buckets or from none.
-- keys: buckets. arguments, from the `first` on: longest wait in seconds; then for each bucket its rate per
-- second, its burst, the cost.
-- Returns 1 if it was taken, else 0, and the seconds to wait: before acting, or before asking again.
local function take_tokens(keys, arguments, first)
  local now = now_s()
  local start, full = now, {}
  for i, key in ipairs(keys) do
    local rate, burst, cost = unpack(arguments, first + 3 * i - 2, first + 3 * i)
    full[i] = full_at(key, rate, burst, now)
    if tonumber(cost) > 0 then
      -- what costs more than fits in goes when the bucket is full, and leaves a debt
      start = math.max(start, full[i] - (burst - math.min(cost, burst)) / rate)
    end
  end
  local wait = start - now
  if wait > tonumber(arguments[first]) then return {0, string.format('%.6f', wait)} end
  for i, key in ipairs(keys) do
    local rate, burst, cost = unpack(arguments, first + 3 * i - 2, first + 3 * i)
    local after = math.min(math.max(full[i], start) + cost / rate, now + burst / rate + MOST_DEBT_S)
    if after > now then
      redis.call('SET', key, string.format('%.6f', after), 'PX', math.ceil((after - now) * 1000))
    else
      redis.call('DEL', key)
    end
  end
  return {1, string.format('%.6f', wait)}
end
