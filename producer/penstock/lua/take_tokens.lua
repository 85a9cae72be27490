-- Takes from token buckets, from all or from none; see _bucket.lua.
--
-- KEYS: buckets.
-- ARGV: longest wait in seconds; then of each bucket its rate per second, its burst, the cost.
-- Returns 1 if it was taken, else 0; then the seconds to wait.
-- Uses _bucket.lua.

return take_tokens(KEYS, ARGV, 1)
