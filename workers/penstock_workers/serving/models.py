"""What one worker process serves: an engine and a batcher for each of its models."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from penstock.errors import ConfigError, ModelLoadError, UnknownModelError, WrongTaskError
from penstock.registry import ModelInfo
from penstock.request import Request, Task, describe
from penstock.result import Usage
from penstock.settings import MODEL_NAME, ModelSettings, Settings
from penstock_workers.batching.batcher import Batcher
from penstock_workers.batching.cuts import Cut, cut_by_tokens
from penstock_workers.batching.scheduler import Scheduler
from penstock_workers.batching.turns import Device, Turn
from penstock_workers.engines.source import explain_failure
from penstock_workers.remote.dispatcher import Dispatcher
from penstock_workers.serving.vector_cache import VectorCache

if TYPE_CHECKING:  # torch loads with the first model, not with the app
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from penstock_workers.engines.embedding import Embedder
    from penstock_workers.engines.reranking import Reranker
    from penstock_workers.engines.tokenizing import Encoded
    from penstock_workers.generation.answering import Answer
    from penstock_workers.generation.generator import Generator
    from penstock_workers.generation.sequence import ScheduledSequence
    from penstock_workers.remote.chat import RemoteGenerator
    from penstock_workers.remote.embedding import RemoteEmbedder


DEFAULT_SHARES: Final[Mapping[Task, float]] = {"embed": 2.0, "generate": 1.0, "rerank": 2.0}
"""Weights of models that have none: a text takes milliseconds, and its caller waits for the whole of them."""

HELD_S: Final = 0.1
"""Work that a process holds, two jobs apart, seconds: more would wait here while others are free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEmbedder:
    """An embedding model, the batches it is fed, and what is kept of its answers."""

    info: ModelInfo
    engine: "Embedder | RemoteEmbedder"
    batcher: "Batcher[Any, NDArray[np.float32]] | Dispatcher[Any, NDArray[np.float32]]"
    cache: VectorCache | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedGenerator:
    """A generation model and the batch that its jobs join and leave."""

    info: ModelInfo
    engine: "Generator | RemoteGenerator"
    batcher: "Scheduler[Any, ScheduledSequence[Answer], Answer] | Dispatcher[Any, Any]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedReranker:
    """A cross-encoder and the batches it is fed."""

    info: ModelInfo
    engine: "Reranker"
    batcher: "Batcher[Encoded, float]"


Served = ServedEmbedder | ServedGenerator | ServedReranker
S = TypeVar("S", ServedEmbedder, ServedGenerator, ServedReranker)
_TASKS: Final[Mapping[type, Task]] = {
    ServedEmbedder: "embed",
    ServedGenerator: "generate",
    ServedReranker: "rerank",
}


class Cost:
    """What the jobs of a model cost; the last hundred or so weigh most."""

    _DECAY: Final = 0.99

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_jobs = self._n_characters = self._prompt_tokens = self._answer_tokens = 0.0

    def count(self, n_characters: int, usage: Usage) -> None:
        """Take note of a job."""
        with self._lock:
            self._n_jobs = self._DECAY * self._n_jobs + 1
            self._n_characters = self._DECAY * self._n_characters + n_characters
            self._prompt_tokens = self._DECAY * self._prompt_tokens + usage.prompt_tokens
            self._answer_tokens = self._DECAY * self._answer_tokens + usage.completion_tokens

    @property
    def tokens_per_character(self) -> float:
        """Prompt tokens in a character of what was sent."""
        return self._prompt_tokens / max(self._n_characters, 1)

    @property
    def answer_tokens(self) -> float:
        """Tokens of an answer; 0 for an embedding model."""
        return self._answer_tokens / max(self._n_jobs, 1)


class Serving:
    """The models of this process, by name; empty until they are loaded.

    Attributes:
        models: those that are loaded.
        paused: those whose jobs are not taken, by Celery's command `cancel_consumer`.
    """

    def __init__(self) -> None:
        self.models: dict[str, Served] = {}
        self.paused: set[str] = set()
        self._device = Device()
        self._costs: dict[str, Cost] = {}
        self._is_stalled = False

    def count(self, request: Request, usage: Usage) -> None:
        """Take note of what a job cost, so that senders can tell beforehand; any thread may call."""
        self._costs.setdefault(request.model, Cost()).count(request.n_characters, usage)

    def costs(self) -> Mapping[str, "Cost"]:
        """Return what jobs cost, by model."""
        return dict(self._costs)

    def find(self, model: str, kind: type[S]) -> S:
        """Return a model of one kind.

        Raises:
            UnknownModelError: this process does not serve it.
            WrongTaskError: it does something else.
        """
        served = self.models.get(model)
        if served is None:
            told = model if MODEL_NAME.fullmatch(model) else describe(model)
            raise UnknownModelError(told, sorted(self.models))
        if not isinstance(served, kind):
            raise WrongTaskError(model, served.info.task, _TASKS[kind])
        return served

    def turn(self, model: str, settings: Settings) -> Turn:
        """Return a model's turns on the device."""
        found = settings.models[model]
        return self._device.turn(found.share or DEFAULT_SHARES[found.task])

    def is_stalled(self, stall_s: float) -> bool:
        """Whether any model has once shown no sign of life for this long, in seconds, while it should.

        Once seen it stays so: the process is about to end, and must not take over from itself meanwhile.
        """
        if any(served.batcher.is_stalled(stall_s) for served in self.models.values()):
            self._is_stalled = True
        return self._is_stalled

    def speeds(self) -> Mapping[str, float]:
        """Return measured tokens per second by model."""
        measured = {name: served.batcher.tokens_per_s for name, served in self.models.items()}
        return {name: round(speed, 1) for name, speed in measured.items() if speed is not None}

    def room(self, model: str) -> float | None:
        """Return how many tokens of a model's jobs this process may hold; None for any.

        Those that join a running batch are bounded by its places, those of remote models by what their
        servers take; what is cached costs nothing.
        """
        served = self.models.get(model)
        if served is None or not isinstance(served.batcher, Batcher):
            return None
        if isinstance(served, ServedEmbedder) and served.cache is not None:
            return None
        return HELD_S * (served.batcher.tokens_per_s or 0.0)

    def troubles(self) -> Mapping[str, str]:
        """Return what is wrong with the servers of remote models, by model; without those that are well."""
        callers = {name: served.batcher for name, served in self.models.items()}
        told = {name: one.trouble for name, one in callers.items() if isinstance(one, Dispatcher)}
        return {name: trouble for name, trouble in told.items() if trouble}

    def caches(self) -> Mapping[str, VectorCache]:
        """Return the caches by model, where vectors are cached."""
        embedders = {name: one for name, one in self.models.items() if isinstance(one, ServedEmbedder)}
        return {name: embedder.cache for name, embedder in embedders.items() if embedder.cache is not None}


def load_model(
    name: str, settings: Settings, device: "torch.device | None", turn: Turn | None = None
) -> Served:
    """Load a model and start its batcher.

    Args:
        name: of the model.
        settings: what is known of it.
        device: where it computes; remote models need none.
        turn: see `ModelThread`.

    Raises:
        ModelLoadError: one line that says why.
    """
    try:
        return _load(name, settings, device, turn)
    except (ConfigError, ModelLoadError):
        raise
    except Exception as error:  # of foreign code on foreign files: the next start would meet it again
        raise explain_failure(name, error) from error


def _load(name: str, settings: Settings, device: "torch.device | None", turn: Turn | None) -> Served:
    model = settings.models[name]
    if model.engine == "remote":
        return _load_remote(name, model, settings)
    assert device is not None
    if model.task == "embed":
        from penstock_workers.engines.embedding import Embedder

        embedder = Embedder.load(name, model, device)
        measured = None
        if device.type != "cpu" and model.max_batch_tokens is None:
            n_tokens, seconds = embedder.learn_batch_tokens()
            measured = None if seconds is None else (n_tokens, seconds)
            model = model.model_copy(update={"max_batch_tokens": n_tokens})
        return ServedEmbedder(
            info=replace(
                _describe(name, model, embedder.dim, embedder.max_tokens, embedder.dtype, embedder.batching),
                int8_ranges=_announce_ranges(embedder.int8_ranges),
            ),
            engine=embedder,
            cache=_open_cache(embedder, settings),
            batcher=Batcher(
                name,
                embedder.run,
                cut_texts(model, embedder, device),
                turn,
                n_threads=batches_at_once(device, turn),
                measured=measured,
            ),
        )
    if model.task == "rerank":
        from penstock_workers.engines.reranking import Reranker

        reranker = Reranker.load(name, model, device)
        return ServedReranker(
            info=_describe(name, model, None, reranker.max_tokens, reranker.dtype, reranker.batching),
            engine=reranker,
            batcher=Batcher(name, reranker.run, cut_texts(model, reranker, device), turn),
        )
    from penstock_workers.generation.generator import Generator

    generator = Generator.load(name, model, device)
    if turn is not None:
        generator.pause_between_layers(turn.pause)
    return ServedGenerator(
        info=_describe(
            name, model, None, generator.context_window, generator.dtype, str(generator.batch_mode)
        ),
        engine=generator,
        batcher=Scheduler(name, generator.decoding(max_rows=model.max_batch_size), generator.sequence, turn),
    )


def _load_remote(name: str, model: ModelSettings, settings: Settings) -> Served:
    try:
        from penstock_workers.remote.chat import RemoteGenerator
        from penstock_workers.remote.embedding import RemoteEmbedder
    except ModuleNotFoundError as error:
        raise ModelLoadError(name, f"{error.name} is missing: pip install 'penstock[remote]'") from error
    if model.task == "embed":
        embedder = RemoteEmbedder.load(name, model, settings.broker_url)
        return ServedEmbedder(
            info=replace(
                _describe(name, model, embedder.dim, embedder.max_tokens, "remote", embedder.protocol),
                int8_ranges=_announce_ranges(embedder.int8_ranges),
            ),
            engine=embedder,
            cache=_open_cache(embedder, settings),
            batcher=Dispatcher(embedder),
        )
    generator = RemoteGenerator.load(name, model, settings.broker_url)
    return ServedGenerator(
        info=_describe(name, model, None, generator.context_window, "remote", "openai"),
        engine=generator,
        batcher=Dispatcher(generator),
    )


def cut_texts(model: ModelSettings, engine: "Embedder | Reranker", device: "torch.device") -> Cut:
    """Return how the batches of a model that reads texts are cut."""
    return cut_by_tokens(
        model.max_batch_tokens or _batch_tokens(device, engine.batching),
        is_padded=engine.is_padded,
        # accelerators have attention kernels that keep no scores
        n_heads=engine.n_heads if device.type == "cpu" else None,
    )


def batches_at_once(device: "torch.device", turn: Turn | None = None) -> int:
    """Return how many batches of an embedding model are under way: two on a card that is its own.

    There a thread waits for kernels most of the time, and kernels for a thread that lays out the next batch.
    """
    return 2 if device.type == "cuda" and turn is None else 1


def _batch_tokens(device: "torch.device", batching: str) -> int:
    # Measured on a processor with all-MiniLM-L6-v2, one thread: padded, 180 texts/s by 512 tokens, 171 by
    # 1,024, 150 by 2,048, since activations then stay in its caches; packed, 237, 243 and 256; by OpenVINO,
    # 269, 272 and 263. Two processes at once: packed, 511, 528 and 494. Accelerators want far more: the
    # default of TEI.
    if device.type != "cpu":
        return 16_384
    return 512 if batching == "padded" else 1024


def _open_cache(embedder: "Embedder | RemoteEmbedder", settings: Settings) -> VectorCache | None:
    cache = settings.models[embedder.name].cache
    if cache is None:
        return None
    return VectorCache(
        embedder.name,
        embedder.fingerprint,
        embedder.dim,
        cache,
        url=settings.results_url,
        lease_s=settings.worker.lease_s,
    )


def _announce_ranges(ranges: "NDArray[np.float32] | None") -> tuple[tuple[float, ...], ...] | None:
    # nine digits are all of a float32
    return None if ranges is None else tuple(tuple(float(f"{x:.9g}") for x in row) for row in ranges)


def _describe(
    name: str, model: ModelSettings, dim: int | None, max_tokens: int | None, dtype: str, batching: str
) -> ModelInfo:
    return ModelInfo(
        name=name,
        task=model.task,
        pools=model.pools,
        dim=dim,
        max_tokens=max_tokens,
        max_texts=model.max_texts,
        deadline_s=model.deadline_s,
        max_waiting_jobs=model.max_waiting_jobs,
        max_waiting_tokens=model.max_waiting_tokens,
        max_waiting_bytes=model.max_waiting_bytes,
        dtype=dtype,
        batching=batching,
    )
