"""What one worker process serves: an engine for each of its models, and what feeds it."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Never, Protocol, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from penstock.errors import UnknownModelError, WrongTaskError
from penstock.registry import ModelInfo
from penstock.request import EmbedRequest, GenerateRequest, Request, RerankRequest, Task
from penstock.result import Usage
from penstock.validation import describe
from penstock_workers.batching.feed import Answer, Feed, HasTokens, StreamingFeed
from penstock_workers.batching.rate import Ratio
from penstock_workers.batching.turns import Device, Turn
from penstock_workers.serving.vector_cache import VectorCache
from penstock_workers.settings import MODEL_NAME, Settings

DEFAULT_SHARES: Final[Mapping[Task, float]] = {"embed": 2.0, "generate": 1.0, "rerank": 2.0}
"""Shares of models that name none: texts take milliseconds each, and callers wait for all of theirs."""

I_co = TypeVar("I_co", bound=HasTokens, covariant=True)
A_contra = TypeVar("A_contra", contravariant=True)
Vector: TypeAlias = NDArray[np.float32]


class EmbedEngine(Protocol[I_co]):
    """Turns texts into items of batches, here or at a server."""

    @property
    def dim(self) -> int:
        """Width of its vectors."""

    @property
    def int8_ranges(self) -> NDArray[np.float32] | None:
        """Ranges of the dimensions, float32, shape (2, dim) or (2, 1); None refuses int8."""

    def check(self, request: EmbedRequest) -> str | None:
        """Return the prompt that is put before each text, and so into the key of its cached vector.

        Raises:
            InvalidOptionError: the model has no such vectors.
        """

    def prepare(self, request: EmbedRequest) -> Sequence[I_co]:
        """Return an item for each text.

        Raises:
            RequestError: a text or an option does not suit the model.
        """


class Prompt(Protocol[I_co, A_contra]):
    """A request for text, ready for its engine."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the prompt."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of one answer."""

    @property
    def n_choices(self) -> int:
        """Number of answers that are wanted."""

    @property
    def n_top_logprobs(self) -> int | None:
        """Number of tokens whose log-probabilities are wanted beside the chosen one's; None for no such."""

    @property
    def cut_tokens(self) -> int | None:
        """See `Usage`."""

    def choices(self) -> Sequence[I_co]:
        """Return what is to be computed for it."""

    def answers(self, found: Sequence[A_contra]) -> Sequence[Answer]:
        """Return as many answers as are wanted of what was computed for `choices`."""


class GenerateEngine(Protocol[I_co, A_contra]):
    """Turns requests for text into items of batches, here or at a server."""

    def prepare(self, request: GenerateRequest) -> Prompt[I_co, A_contra]:
        """Return the request, ready to be computed.

        Raises:
            RequestError: a text or an option does not suit the model.
        """


class RerankEngine(Protocol[I_co]):
    """Turns a query and documents into items of batches."""

    def prepare(self, request: RerankRequest) -> Sequence[I_co]:
        """Return an item for each document.

        Raises:
            RequestError: a text does not suit the model.
        """


E_co = TypeVar("E_co", covariant=True)
F_co = TypeVar("F_co", bound=Feed[Never, object], covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served(Generic[E_co, F_co]):
    """A model that is served.

    Attributes:
        info: Announcement of the model.
        engine: Engine of the model, which makes items of requests.
        feed: Answers these items.
        cache: Keeps its vectors; None if none are kept.
    """

    info: ModelInfo
    engine: E_co
    feed: F_co
    cache: VectorCache | None = None


AnyServed: TypeAlias = Served[object, Feed[Never, object]]
ServedEmbedder: TypeAlias = Served[EmbedEngine[HasTokens], Feed[HasTokens, Vector]]
ServedGenerator: TypeAlias = Served[GenerateEngine[HasTokens, object], StreamingFeed[HasTokens, object]]
ServedReranker: TypeAlias = Served[RerankEngine[HasTokens], Feed[HasTokens, float]]


class Cost:
    """What the jobs of a model cost; the last hundred or so weigh most. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prompts, self._answers = Ratio(0.99), Ratio(0.99)

    def count(self, n_characters: int, usage: Usage) -> None:
        """Count a job."""
        with self._lock:
            self._prompts.count(usage.prompt_tokens, n_characters)
            self._answers.count(usage.completion_tokens, 1)

    @property
    def tokens_per_character(self) -> float:
        """Prompt tokens in a character of what was sent."""
        return self._prompts.amount / max(self._prompts.per, 1)

    @property
    def answer_tokens(self) -> float:
        """Tokens of an answer; 0 for an embedding model."""
        return self._answers.amount / max(self._answers.per, 1)


class Serving:
    """The models of this process, by name; empty until they are loaded.

    Attributes:
        models: Models that are loaded.
        paused: Models whose jobs are not taken, by Celery's command `cancel_consumer`.
    """

    def __init__(self) -> None:
        self.models: dict[str, AnyServed] = {}
        self.paused: set[str] = set()
        self._device = Device()
        self._costs: dict[str, Cost] = {}
        self._is_stalled = False

    def embedder(self, model: str) -> ServedEmbedder:
        """Return an embedding model; see `_find`."""
        return cast("ServedEmbedder", self._find(model, "embed"))

    def generator(self, model: str) -> ServedGenerator:
        """Return a generation model; see `_find`."""
        return cast("ServedGenerator", self._find(model, "generate"))

    def reranker(self, model: str) -> ServedReranker:
        """Return a cross-encoder; see `_find`."""
        return cast("ServedReranker", self._find(model, "rerank"))

    def _find(self, model: str, task: Task) -> object:
        """Return a model for a task.

        Raises:
            UnknownModelError: this process does not serve it.
            WrongTaskError: it does something else.
        """
        served = self.models.get(model)
        if served is None:
            told = model if MODEL_NAME.fullmatch(model) else describe(model)
            raise UnknownModelError(told, sorted(self.models))
        if served.info.task != task:
            raise WrongTaskError(model, served.info.task, task)
        return served

    def count(self, request: Request, usage: Usage) -> None:
        """Count what a job cost, so that senders can tell beforehand; any thread may call."""
        cost = self._costs.get(request.model) or self._costs.setdefault(request.model, Cost())
        cost.count(request.n_characters, usage)

    def costs(self) -> Mapping[str, Cost]:
        """Return what jobs cost, by model."""
        return dict(self._costs)

    def turn(self, model: str, settings: Settings) -> Turn:
        """Return a model's turns on the device."""
        found = settings.models[model]
        return self._device.turn(found.share or DEFAULT_SHARES[found.task])

    def is_stalled(self, stall_s: float) -> bool:
        """Whether any model has once shown no sign of life for this long, in seconds, while it should.

        Once seen it stays so: the process is about to end, and must not take over from itself meanwhile.
        """
        if any(served.feed.is_stalled(stall_s) for served in self.models.values()):
            self._is_stalled = True
        return self._is_stalled

    def speeds(self) -> Mapping[str, float]:
        """Return measured tokens per second by model."""
        measured = {name: served.feed.tokens_per_s for name, served in self.models.items()}
        return {name: round(speed, 1) for name, speed in measured.items() if speed is not None}

    def token_budget(self, model: str) -> float | None:
        """Return how many tokens of a model's jobs this process should hold; None for any number."""
        served = self.models.get(model)
        # What is cached costs nothing.
        return None if served is None or served.cache is not None else served.feed.token_budget()

    def troubles(self) -> Mapping[str, str]:
        """Return what is wrong with the servers of remote models, by model; without those that are well."""
        told = {name: served.feed.trouble() for name, served in self.models.items()}
        return {name: trouble for name, trouble in told.items() if trouble}

    def caches(self) -> Mapping[str, VectorCache]:
        """Return the caches by model, where vectors are cached."""
        found = {name: served.cache for name, served in self.models.items()}
        return {name: cache for name, cache in found.items() if cache is not None}
