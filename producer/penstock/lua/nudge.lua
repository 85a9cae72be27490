#!lua flags=allow-oom
-- Wakes a process' wait: a place has become free that it did not wait for.
--
-- KEYS: none.
-- ARGV: process.
-- Uses _lists.lua.

wake(ARGV[1])
