-- A job ends once: whoever comes second (a cancelled job's worker, a second delivery) changes nothing.
-- The payload travels to Redis once; whoever follows Celery's own channel gets all of it, our clients a note,
-- behind which up to 16 KiB come along: fetching them costs more than sending them.
--
-- KEYS: result, record; to cancel a job also the set and channel of cancelled ones.
-- ARGV: payload, result TTL, record TTL, status, is final (1/0), must be sent (1/0), reply channel or '',
-- job id, how many cancelled jobs are remembered.
-- Returns 1 if the job has ended now, else 0.

local record = redis.call('GET', KEYS[2])
if (record and record ~= 'sent') or (not record and ARGV[6] == '1') then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
if ARGV[5] == '1' then redis.call('SET', KEYS[2], ARGV[4], 'EX', ARGV[3]) end
redis.call('PUBLISH', KEYS[1], ARGV[1])
if ARGV[5] == '1' and ARGV[7] ~= '' then
  redis.call('PUBLISH', ARGV[7], ARGV[8] .. (#ARGV[1] <= 16384 and '\n' .. ARGV[1] or ''))
end
if KEYS[3] then
  redis.call('ZADD', KEYS[3], redis.call('TIME')[1], ARGV[8])
  redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -1 - ARGV[9])
  redis.call('EXPIRE', KEYS[3], ARGV[3])
  redis.call('PUBLISH', KEYS[3], ARGV[8])
end
return 1
