"""Writes the recorded messages and results: `python -m tests.golden.make`, once per version.

An existing recording is never written again. Who changes a format raises its version, adds the new
version's files here, and leaves the old ones for `test_golden.py` to read for ever.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from penstock.codec import encode_failure, encode_meta
from penstock.conversation import Message
from penstock.errors import InputTooLongError
from penstock.messages import encode_message
from penstock.request import EmbedRequest, GenerateRequest, Priority, Request, RerankRequest
from penstock.result import EmbedResult, GenerateResult, RerankResult, Result, Timings, Usage

FOLDER: Final = Path(__file__).parent
JOB_ID: Final = "6f3c2f60-0b1e-4f7a-9a55-0d6f5e1c2b3a"
REPLY_TO: Final = "penstock:reply:1d0c9f1e-7f0b-4f57-8c39-5b0d2f6a7e88"
ORIGIN: Final = "penstock-4711@sender.example"

EMBED_REQUEST: Final = EmbedRequest(
    model="minilm",
    sent_at=1767225600.25,
    deadline=1767225660.25,
    texts=["a text", "Grüße, 世界 🌊", "", 'quotes " and \\ and \n and \0'],
    prompt="query: ",
    prompt_name="query",
    normalize_embeddings=True,
    truncate_dim=3,
    precision="float16",
)
GENERATE_REQUEST: Final = GenerateRequest(
    model="chat",
    sent_at=1767225600.25,
    deadline=1767225660.25,
    prompt="What is my name?",
    system_prompt="Be brief.",
    history=(
        Message(role="user", content="My name is Ada."),
        Message(role="assistant", content="Hello, Ada."),
    ),
    max_new_tokens=64,
    context_window=2048,
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    seed=42,
    stop=("\n\n", "END"),
    truncation="oldest_turns",
)
TIMINGS: Final = Timings(queued_s=0.5, prepared_s=0.001, batched_s=0.25, computed_s=0.125)
EMBED_RESULT: Final = EmbedResult(
    model="minilm",
    vectors=np.array([[0.0, -1.5, 3.0], [1e-3, 65504.0, -0.0]], dtype=np.float32),
    usage=Usage(prompt_tokens=11),
    timings=TIMINGS,
)
_COMPACT: Final = {
    "float16": np.array([[0.0, -1.5, 65504.0]], dtype=np.float16),
    "int8": np.array([[-128, 0, 127], [1, 2, 3]], dtype=np.int8),
    "binary": np.array([[-128, 127]], dtype=np.int8),
    "ubinary": np.array([[0, 255], [128, 1]], dtype=np.uint8),
}
COMPACT_RESULTS: Final = {
    precision: replace(EMBED_RESULT, vectors=vectors) for precision, vectors in _COMPACT.items()
}
"""An embedding result in each precision but float32."""
GENERATE_RESULT: Final = GenerateResult(
    model="chat",
    text="Ada. Grüße 🌊",
    finish_reason="stop",
    usage=Usage(prompt_tokens=30, completion_tokens=5),
    timings=TIMINGS,
)
RERANK_REQUEST: Final = RerankRequest(
    model="cross",
    sent_at=1767225600.25,
    deadline=1767225660.25,
    query="Who has the key?",
    documents=["Ada has the key.", "Grüße, 世界 🌊", ""],
    top_n=2,
)
RERANK_RESULT: Final = RerankResult(
    model="cross",
    scores=np.array([1.0, -0.0, 1e-3], dtype=np.float32),
    order=[0, 2],
    usage=Usage(prompt_tokens=23),
    timings=TIMINGS,
)
FAILURE: Final = InputTooLongError("chat", 4096, 2048)


def recordings() -> dict[str, bytes]:
    """Return today's bytes by file name."""
    return {
        "message-embed-v1.json": _message(EMBED_REQUEST, "gpu.minilm", Priority.DEFAULT),
        "message-generate-v1.json": _message(GENERATE_REQUEST, "cpu.chat", Priority.INTERACTIVE),
        "message-rerank-v1.json": _message(RERANK_REQUEST, "cpu.cross", Priority.BATCH),
        "result-embed-v1.bin": _result(EMBED_RESULT),
        **{
            f"result-embed-{precision}-v1.bin": _result(result)
            for precision, result in COMPACT_RESULTS.items()
        },
        "result-generate-v1.bin": _result(GENERATE_RESULT),
        "result-rerank-v1.bin": _result(RERANK_RESULT),
        "failure-v1.bin": encode_failure(JOB_ID, FAILURE),
    }


def write(folder: Path) -> list[str]:
    """Write what is not there yet, and return its names.

    Raises:
        FileExistsError: every recording is there; a changed format needs a new version.
    """
    missing = {name: content for name, content in recordings().items() if not (folder / name).exists()}
    if not missing:
        raise FileExistsError(f"{folder} holds all recordings; a changed format needs a new version")
    for name, content in missing.items():
        with (folder / name).open("xb") as file:
            file.write(content)
    return list(missing)


def _message(request: Request, queue: str, priority: Priority) -> bytes:
    return encode_message(
        request, job_id=JOB_ID, queue=queue, priority=priority, reply_to=REPLY_TO, origin=ORIGIN
    )


def _result(result: Result) -> bytes:
    # What Celery's backend hands over for a task that succeeded.
    return encode_meta(
        {"status": "SUCCESS", "result": result, "traceback": None, "children": [], "task_id": JOB_ID}
    )


if __name__ == "__main__":
    sys.stdout.write("\n".join([*write(FOLDER), ""]))
