"""What the result store holds for a job, and the one script that ends a job.

| key | type | holds | written by |
| --- | --- | --- | --- |
| `celery-task-meta-<id>` | string | the result record of `codec.encode_meta` | worker, `Job.cancel` |
| `penstock:job:<id>` | string | `sent`, or the status the job ended with | sender, worker, `Job.cancel` |
| `penstock:reply:<client>` | channel | ids of jobs that ended, small results behind | worker, `Job.cancel` |
| `penstock:stream:<id>` | stream | pieces of text: see `penstock.stream` | worker |
| `penstock:cancelled` | sorted set, channel | ids of cancelled jobs, by when | `Job.cancel` |

A job whose id nobody was told has no record until it ends: its sender is the only one who can ask.
"""

from typing import Final

from penstock.keys import CANCELLED_KEY, RECORD_TTL_S, is_reply_channel, record_key, result_key

SENT: Final = "sent"
MAX_CANCELLED: Final = 100_000
"""How many cancelled jobs are remembered; a worker that misses one computes in vain."""

# A job ends once: whoever comes second (a cancelled job's worker, a second delivery) changes nothing.
# The payload travels to Redis once; whoever follows Celery's own channel gets all of it, our clients a note,
# behind which up to 16 KiB come along: fetching them costs more than sending them.
#
# KEYS: result, record; to cancel a job also the set and channel of those.
# ARGV: payload, result TTL, record TTL, status, is final (1/0), must be sent (1/0), reply channel or "",
# job id, how many cancelled jobs are remembered.
END_JOB: Final = """
local record = redis.call('GET', KEYS[2])
if (record and record ~= 'sent') or (not record and ARGV[6] == '1') then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
if ARGV[5] == '1' then redis.call('SET', KEYS[2], ARGV[4], 'EX', ARGV[3]) end
redis.call('PUBLISH', KEYS[1], ARGV[1])
if ARGV[5] == '1' and ARGV[7] ~= '' then
  redis.call('PUBLISH', ARGV[7], ARGV[8] .. (#ARGV[1] <= 16384 and '\\n' .. ARGV[1] or ''))
end
if KEYS[3] then
  redis.call('ZADD', KEYS[3], redis.call('TIME')[1], ARGV[8])
  redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -1 - ARGV[9])
  redis.call('EXPIRE', KEYS[3], ARGV[3])
  redis.call('PUBLISH', KEYS[3], ARGV[8])
end
return 1
"""


def end_job_arguments(
    *,
    job_id: str,
    payload: bytes,
    status: str,
    is_final: bool,
    is_cancel: bool = False,
    must_be_sent: bool = False,
    result_ttl_s: int,
    reply_to: str | None,
) -> tuple[list[str], list[str | bytes | int]]:
    """Return the keys and arguments of `END_JOB`."""
    channel = str(reply_to) if is_reply_channel(reply_to) else ""
    keys = [result_key(job_id), record_key(job_id), *([CANCELLED_KEY] if is_cancel else [])]
    ttls = (result_ttl_s, result_ttl_s + RECORD_TTL_S)
    flags = (int(is_final), int(must_be_sent))
    return keys, [payload, *ttls, status, *flags, channel, job_id, MAX_CANCELLED]
