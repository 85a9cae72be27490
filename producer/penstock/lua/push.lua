#!lua flags=
-- Puts messages into a list, all or none, and wakes an idle worker.
--
-- KEYS: the list.
-- ARGV: most jobs, tokens and bytes that the queue may have, tokens per second that its workers do, seconds that a message
-- may wait; each may be ''. Then, of each message: itself, when it is due in Unix seconds or ''.
-- Returns how many wait in the list; 0 if the last message is delayed. If none was queued: seconds until it is worth asking
-- again, the predicted wait in seconds or '', and what is exceeded.
-- Uses _lists.lua, _counts.lua, _moves.lua, _bucket.lua.

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
    local taken = take_tokens({'penstock:bucket:tenant:' .. tenant}, {0, rate, 60 * rate, tokens}, 1)
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
