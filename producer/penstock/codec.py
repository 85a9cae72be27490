"""Results as bytes, as the result store keeps them: version 1 is described in docs/reference/messages.md.

A JSON header and raw little-endian buffers; nothing here can run code that came over the wire.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.codec_fields import TYPES, build_object, is_timings
from penstock.errors import (
    JobCancelledError,
    PenstockError,
    ResultDecodeError,
    ResultTooLargeError,
    rebuild_error,
)
from penstock.result import Result

CONTENT_TYPE = "application/x-penstock-result"
SERIALIZER = "penstock"

MAGIC = b"PNS\x01"
PREAMBLE = struct.Struct("<4sI")  # magic with the version, length of the header in bytes
ALIGNMENT = 64  # buffers start at a multiple: numpy and any SIMD code read them in place
DTYPES: Mapping[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("<f4", "<f2", "<i4", "|i1", "|u1")}
MAX_RESULT_BYTES = 512 << 20
"""Redis' own limit of one string: `proto-max-bulk-len`, 512 MB by default."""

MAX_HEADER_BYTES = 32 << 20
"""Limit of a header, which holds an answer's text: many times what a context window holds."""
MAX_STRUCTURE_BYTES = 2 << 20
"""Limit of a header without its texts: three bytes of `{},` become sixty in memory, and more."""

Status = Literal["SUCCESS", "FAILURE", "REVOKED"]
"""How a job ended, in Celery's words."""

_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a job: a result, or the error that its caller gets."""

    status: Status
    result: Result | None = None
    error: PenstockError | None = None


def encode_meta(meta: Any) -> bytes:
    """Serialize what Celery stores for a job; arrays follow the JSON header as raw buffers.

    Raises:
        TypeError: an array of a dtype that is not in `DTYPES`, or an object that is not ours.
        ResultTooLargeError: more bytes than Redis takes in one string.
    """
    arrays: list[NDArray[Any]] = []

    def default(value: object) -> object:
        if isinstance(value, np.ndarray):
            little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
            if little.dtype.str not in DTYPES:
                raise TypeError(
                    f"arrays of dtype {value.dtype} are not sent, only float32, float16, int32, int8, uint8"
                )
            arrays.append(little)
            return {"__array__": len(arrays) - 1, "dtype": little.dtype.str, "shape": list(little.shape)}
        if type(value).__name__ in TYPES:
            named = {field.name: getattr(value, field.name) for field in fields(value)}  # type: ignore[arg-type]  # a dataclass: it is in TYPES
            # None is what came after version 1 was first written: clients of then read all but that.
            present = {name: item for name, item in named.items() if item is not None}
            return {"__record__": type(value).__name__, **present}
        raise TypeError(f"{type(value).__name__} objects are not sent")

    # A lone surrogate, in what an error quotes, must not cost the caller the error.
    text = json.dumps(meta, default=default, ensure_ascii=False, separators=(",", ":"))
    header = text.encode(errors="replace")
    header += b" " * (-(PREAMBLE.size + len(header)) % ALIGNMENT)
    if len(header) > MAX_HEADER_BYTES:
        raise ResultTooLargeError(len(header), MAX_HEADER_BYTES)
    n_bytes = PREAMBLE.size + len(header) + sum(_padded(array.nbytes) for array in arrays)
    if n_bytes > MAX_RESULT_BYTES:
        raise ResultTooLargeError(n_bytes, MAX_RESULT_BYTES)
    parts: list[bytes | memoryview] = [PREAMBLE.pack(MAGIC, len(header)), header]
    for array in arrays:
        parts += [array.reshape(-1).view(np.uint8).data, bytes(_padded(array.nbytes) - array.nbytes)]
    return b"".join(parts)


def decode_meta(payload: bytes | memoryview) -> Any:
    """Read what `encode_meta` wrote; arrays are read-only views of `payload`.

    Every size is checked against the payload before an array is made.

    Raises:
        ResultDecodeError: not a result, another version, or sizes that do not fit.
    """
    if len(payload) < PREAMBLE.size or payload[:3] != MAGIC[:3]:
        raise ResultDecodeError("it does not begin with the mark of a Penstock result")
    magic, header_bytes = PREAMBLE.unpack_from(payload)
    if magic != MAGIC:
        raise ResultDecodeError(f"version {magic[3]}; version {MAGIC[3]} is read here")
    start = PREAMBLE.size + header_bytes
    if start > len(payload):
        raise ResultDecodeError(f"header of {header_bytes} bytes in a payload of {len(payload)}")
    header = bytes(payload[PREAMBLE.size : start])
    if header_bytes > MAX_STRUCTURE_BYTES:
        _check_structure(header)
    expected = 0

    def build(found: dict[str, Any]) -> Any:
        nonlocal start, expected
        if "__array__" in found:
            if found["__array__"] != expected:
                raise ResultDecodeError("arrays out of order")
            array = _view(payload, start, found)
            start, expected = start + _padded(array.nbytes), expected + 1
            return array
        if (name := found.pop("__record__", None)) is not None:
            return build_object(name, found)
        return found

    try:
        # Objects are built innermost first and in the order of the text, which is the arrays' order.
        meta = json.loads(header, object_hook=build)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ResultDecodeError(f"{type(error).__name__} in its header") from error
    if start != len(payload):
        raise ResultDecodeError(f"{len(payload)} bytes, its header describes {start}")
    return meta


def decode_outcome(job_id: str, payload: bytes | memoryview) -> Outcome:
    """Read how a job ended from what the result store holds of it.

    Raises:
        ResultDecodeError: see `decode_meta`; whatever else the store holds.
    """
    try:
        return _read_outcome(job_id, payload)
    except PenstockError:
        raise
    except Exception as error:
        raise ResultDecodeError(f"{type(error).__name__} in its record") from error


def _read_outcome(job_id: str, payload: bytes | memoryview) -> Outcome:
    meta = decode_meta(payload)
    if not isinstance(meta, dict) or "status" not in meta:
        raise ResultDecodeError("it holds no result record")
    if meta["status"] == "SUCCESS":
        result = meta.get("result")
        if not isinstance(result, Result):
            raise ResultDecodeError("the result is of another task")
        return Outcome(status="SUCCESS", result=result)
    failure = meta.get("result")
    if meta["status"] == "REVOKED":
        told = failure.get("exc_message") if isinstance(failure, dict) else None
        timings = told[1:] if isinstance(told, list) else []  # others tell it in words of their own
        known = timings[0] if timings and is_timings(timings[0]) else None
        return Outcome(status="REVOKED", error=JobCancelledError(job_id, known))
    if not isinstance(failure, dict) or "exc_type" not in failure:
        raise ResultDecodeError(f"status {repr(meta['status'])[:80]} without an error")
    message = failure.get("exc_message")
    args = message if isinstance(message, list) else [message]
    return Outcome(status="FAILURE", error=rebuild_error(str(failure["exc_type"]), args))


def encode_failure(job_id: str, error: PenstockError) -> bytes:
    """Serialize an error as Celery's backend would store it."""
    return encode_meta(
        {
            "status": "REVOKED" if isinstance(error, JobCancelledError) else "FAILURE",
            "result": {
                "exc_type": type(error).__name__,
                "exc_message": list(error.args),
                "exc_module": type(error).__module__,
            },
            "traceback": None,
            "children": [],
            "task_id": job_id,
        }
    )


def _check_structure(header: bytes) -> None:
    """Refuse a long header that is not long for its texts."""
    n_bytes = len(header)
    if n_bytes <= MAX_HEADER_BYTES:
        # So many texts are too much structure by their quotes alone.
        texts = islice(_TEXT.finditer(header), MAX_STRUCTURE_BYTES // 2 + 1)
        n_bytes -= sum(max(0, text.end() - text.start() - 2) for text in texts)
    if n_bytes > MAX_STRUCTURE_BYTES:
        raise ResultDecodeError(f"header of {n_bytes} bytes besides texts; limit {MAX_STRUCTURE_BYTES}")


def _view(payload: bytes | memoryview, start: int, told: Mapping[str, Any]) -> NDArray[Any]:
    dtype, shape = DTYPES.get(told.get("dtype", "")), told.get("shape")
    if dtype is None:
        raise ResultDecodeError(f"dtype {repr(told.get('dtype'))[:80]}; {', '.join(DTYPES)} are read here")
    if not isinstance(shape, list) or len(shape) > 4 or not all(type(n) is int and n >= 0 for n in shape):
        raise ResultDecodeError(f"shape {str(shape)[:80]}")
    count = math.prod(shape)
    if start + count * dtype.itemsize > len(payload):
        raise ResultDecodeError(f"array of {count * dtype.itemsize} bytes, {len(payload) - start} are left")
    array: NDArray[Any] = np.frombuffer(payload, dtype=dtype, count=count, offset=start)
    return array.reshape(shape)


def _padded(n_bytes: int) -> int:
    return n_bytes + -n_bytes % ALIGNMENT
