"""Celery's result backend, with our end of a job: one round trip, and no second ending."""

from typing import Any

from celery import states
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError
from redis.exceptions import OutOfMemoryError

from penstock.store import END_JOB, end_job_arguments, record_key


class ResultBackend(RedisBackend):  # type: ignore[misc]  # Celery has no types
    """Stores results with `penstock.store.END_JOB`.

    Celery's own reads the stored result before each write, and lets a late failure replace a result that
    was cancelled or is a failure already.
    """

    def is_ended(self, job_id: str) -> bool:
        """Whether the job was cancelled, or answered by an earlier delivery."""
        record = self.ensure(self.client.get, (record_key(job_id),))
        return record is not None and bytes(record).decode() in states.READY_STATES

    def _store_result(
        self,
        task_id: str,
        result: object,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **_: object,
    ) -> object:
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        payload: bytes = self.encode(meta | {"task_id": task_id})
        keys, arguments = end_job_arguments(
            job_id=task_id,
            payload=payload,
            status=state,
            is_final=state in states.READY_STATES,
            must_be_sent=False,
            result_ttl_s=int(self.expires),
            reply_to=getattr(request, "reply_to", None),
        )
        try:
            self.ensure(self.client.eval, (END_JOB, len(keys), *keys, *arguments))
        except OutOfMemoryError as error:  # not a connection error: Celery would drop the result
            raise BackendStoreError(str(error), state=state, task_id=task_id) from error
        return result
