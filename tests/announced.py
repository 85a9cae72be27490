"""Models and workers as the registry has them, for tests that need no real ones."""

from typing import Any

from penstock.registry import ModelInfo, WorkerInfo


def model(name: str = "minilm", **changes: Any) -> ModelInfo:
    """Return an embedding model of the pool `cpu`, with other fields where `changes` says so."""
    fields: dict[str, Any] = {
        "name": name,
        "task": "embed",
        "pools": ("cpu",),
        "dim": 384,
        "max_tokens": 256,
        "max_texts": 4096,
        "deadline_s": None,
        "dtype": "float32",
    }
    return ModelInfo(**fields | changes)


def worker(worker_id: str = "cpu@host:1", **changes: Any) -> WorkerInfo:
    """Return a ready worker of the model `minilm`, with other fields where `changes` says so."""
    fields: dict[str, Any] = {
        "id": worker_id,
        "host": "host",
        "pid": 1,
        "pool": "cpu",
        "device": "cpu",
        "state": "ready",
        "models": ("minilm",),
        "started_at": 1.0,
    }
    return WorkerInfo(**fields | changes)
