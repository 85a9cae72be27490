"""What the result store holds for a job, and the one script that ends a job.

| key | type | holds | written by |
| --- | --- | --- | --- |
| `celery-task-meta-<id>` | string | the result record of `records.encode_meta` | worker, `Job.cancel` |
| `penstock:job:<id>` | string | `sent`, or the status the job ended with | sender, worker, `Job.cancel` |
| `penstock:reply:<client>` | channel | ids of jobs that ended, small results behind | worker, `Job.cancel` |
| `penstock:stream:<id>` | stream | pieces of text: see `penstock.stream` | worker |
| `penstock:cancelled` | sorted set, channel | ids of cancelled jobs, by when | `Job.cancel` |

A job whose id nobody was told has no record until it ends: its sender is the only one who can ask.
"""

from typing import Final

from penstock.keys import CANCELLED_KEY, RECORD_TTL_S, is_reply_channel, record_key, result_key
from penstock.scripts import script

SENT: Final = "sent"
MAX_CANCELLED: Final = 100_000
"""How many cancelled jobs are remembered; a worker that misses one computes in vain."""

END_JOB: Final = script("end_job")
"""Ends a job, once; its arguments are those of `end_job_arguments`."""


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
