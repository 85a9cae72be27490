-- Adds a piece to the stream of a job's text, and notes it for who reads it.
--
-- KEYS: stream.
-- ARGV: run, characters of its part before the piece, piece, most pieces, time to live in seconds, channel for the
-- note, note, part.
-- Returns how many heard of it.

redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[4], '*', 'run', ARGV[1], 'at', ARGV[2], 'text', ARGV[3],
    'part', ARGV[8])
redis.call('EXPIRE', KEYS[1], ARGV[5])
return redis.call('PUBLISH', ARGV[6], ARGV[7])
