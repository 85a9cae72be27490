"""The registry of models and workers: workers announce, clients discover.

| key (broker's Redis) | type | holds |
| --- | --- | --- |
| `penstock:models` | hash | model name -> `ModelInfo` |
| `penstock:workers` | hash | worker id -> time of its last heartbeat, newline, `WorkerInfo` |
| `penstock:results` | string | where results are kept, without credentials |
| `penstock:tenants` | hash | tenant -> its share, and its tokens per second or 0 |
| `penstock:announced` | hash | `model:<name>`, `tenant:<name>`, `results` -> version, when it was last seen |

A model stays known when its workers are gone: its jobs are accepted and wait. It is forgotten a week after
the last worker in whose settings it was, a tenant a minute after, while other workers live.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Final, Literal, Self

from penstock.keys import ANNOUNCED_KEY, MODELS_KEY, RESULTS_KEY, TENANTS_KEY, WORKERS_KEY, binding_keys
from penstock.request import PoolName, Task
from penstock.scripts import script

HEARTBEAT_S: Final = 2.0
ALIVE_S: Final = 15.0
"""A worker that is silent for longer counts as gone, seconds."""

_UNREADABLE: Final = (AttributeError, RecursionError, TypeError, ValueError)

WorkerState = Literal["loading", "ready", "stalled", "stopping"]

BEAT: Final = script("beat")
"""A sign of life of a worker, and with it what is said above; the script tells how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model, as clients know it.

    Attributes:
        name: the name it is served under.
        task: kind of work that it does.
        pools: pools that serve it, the preferred one first.
        dim: width of its vectors; None for a generation model.
        max_tokens: length limit of a text, or the context window, tokens.
        max_texts: texts in one job.
        deadline_s: deadline of jobs that name none, seconds after they were sent.
        dtype: number format that it computes in; `remote` where another server does.
        batching: way in which texts or requests share forward passes, in the engine's words: `packed` end to
            end or `padded` to the longest, by torch or `padded, OpenVINO`; for generation see
            `generation.batch_mode.BatchMode`.
        int8_ranges: lowest and highest values behind its int8 vectors, for each dimension, or one for all; an
            int8 v stands for lowest + (v + 128.5) * (highest - lowest) / 255. The latter are for vectors of
            unit length, and sqrt(dim / truncate_dim) times as wide for those that were cut and normalised.
        max_waiting_jobs: most jobs of one queue, those that workers hold included; None is no limit.
        max_waiting_tokens: most tokens of these jobs; None is no limit.
        max_waiting_bytes: most bytes of their messages; None is no limit.
    """

    name: str
    task: Task
    pools: tuple[PoolName, ...]
    dim: int | None
    max_tokens: int | None
    max_texts: int
    deadline_s: float | None
    dtype: str
    batching: str = ""
    int8_ranges: tuple[tuple[float, ...], ...] | None = None
    max_waiting_jobs: int | None = None
    max_waiting_tokens: int | None = None
    max_waiting_bytes: int | None = None

    def to_json(self) -> str:
        """Return the registry's form."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read the registry's form; fields of a later version are left out."""
        return cls(**_known(cls, json.loads(text), pools=tuple, int8_ranges=_rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """One worker process.

    Attributes:
        id: unique to the process.
        host: name of the machine.
        pid: process id on that machine.
        pool: kind of hardware that it works on.
        device: the device in torch's words.
        state: `ready` takes jobs; `stalled` has a forward pass without end, or lost a background thread.
        models: names it serves.
        started_at: Unix seconds on the broker's clock.
        load_s: load time of each model, seconds.
        memory_bytes: resident memory of the process.
        units_per_s: measured speed by model, tokens of texts, or of prompts and answers, per second.
        tokens_per_character: measured prompt tokens per character of what was sent, by model.
        answer_tokens: measured tokens of an answer, by model.
        cache_hits: texts that the cache of vectors answered, by model.
        cache_misses: texts that had to be computed where vectors are cached, by model.
        upstreams: problems of the servers of remote models, by model; without those that are well.
        note: reason why it is not ready, else empty.
    """

    id: str
    host: str
    pid: int
    pool: PoolName
    device: str
    state: WorkerState
    models: tuple[str, ...]
    started_at: float
    load_s: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    units_per_s: Mapping[str, float] = field(default_factory=dict)
    tokens_per_character: Mapping[str, float] = field(default_factory=dict)
    answer_tokens: Mapping[str, float] = field(default_factory=dict)
    cache_hits: Mapping[str, int] = field(default_factory=dict)
    cache_misses: Mapping[str, int] = field(default_factory=dict)
    upstreams: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> str:
        """Return the registry's form."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """The part of a heartbeat that is told once: what a worker knows besides itself.

    Attributes:
        values: entries by their names in the script `BEAT`: `results`, `model:<name>`, `tenant:<name>`.
        others: models of the worker's settings that it does not serve.
        queues: queues that it takes jobs from.
    """

    values: Mapping[str, str]
    others: Collection[str]
    queues: Collection[str]

    def keys(self) -> list[str]:
        """Return the keys of `BEAT`."""
        tables = [key for queue in self.queues for key in binding_keys(queue)]
        return [WORKERS_KEY, MODELS_KEY, RESULTS_KEY, TENANTS_KEY, ANNOUNCED_KEY, *tables]

    def arguments(self, worker: "WorkerInfo", version: str, *, with_values: bool) -> list[str | int]:
        """Return the arguments of `BEAT`; without values, they can be asked for."""
        told: list[str | int] = [worker.id, worker.to_json(), version]
        for entry, value in self.values.items():
            told += [entry, len(value.encode()), value if with_values else ""]
        for name in self.others:
            told += [f"model:{name}", "", ""]
        return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """One look at what is served.

    Attributes:
        models: models by name; those whose workers are gone too.
        workers: workers that announced themselves, each with the seconds since its last heartbeat.
        results: place of the results, see `urls.locate_results`; None before the first worker.
    """

    models: Mapping[str, ModelInfo]
    workers: tuple[tuple[WorkerInfo, float], ...]
    results: str | None

    @classmethod
    def read(
        cls,
        models: Mapping[bytes, bytes],
        workers: Mapping[bytes, bytes],
        results: bytes | None,
        now_s: float,
    ) -> Self:
        """Build it from the three keys and Redis' time, without entries that cannot be read."""
        found = {}
        for name, text in models.items():
            with suppress(*_UNREADABLE):
                found[name.decode()] = ModelInfo.from_json(text)
        beats = []
        for entry in workers.values():
            with suppress(*_UNREADABLE):
                second, _, text = entry.partition(b"\n")
                worker = WorkerInfo(**_known(WorkerInfo, json.loads(text), models=tuple))
                beats.append((worker, now_s - float(second)))
        beats.sort(key=lambda beat: (beat[0].pool, beat[0].host, beat[0].pid))
        return cls(models=found, workers=tuple(beats), results=results.decode() if results else None)

    def ready_workers(self, model: str, pool: str) -> int:
        """Count the live workers that take this model's jobs in this pool."""
        return sum(
            worker.pool == pool and model in worker.models and worker.state == "ready" and age_s <= ALIVE_S
            for worker, age_s in self.workers
        )

    def trouble(self, model: str) -> str:
        """Return what is wrong with a remote model's server, as its live workers say; empty if nothing is."""
        told = (worker.upstreams.get(model, "") for worker, age_s in self.workers if age_s <= ALIVE_S)
        return next(filter(None, told), "")

    def tokens_per_s(self, model: str, pool: str) -> float | None:
        """Return the speed of a model's ready workers together; None before the first has measured itself.

        Unmeasured workers count with the average.
        """
        speeds = self.speeds(model, pool)
        return fmean(speeds) * self.ready_workers(model, pool) if speeds else None

    def measured(self, model: str, name: Literal["tokens_per_character", "answer_tokens"]) -> float | None:
        """Return the mean over workers of a measure of `WorkerInfo`; None before the first."""
        found = [values[model] for worker, _ in self.workers if model in (values := getattr(worker, name))]
        return fmean(found) if found else None

    def speeds(self, model: str, pool: str) -> list[float]:
        """Return the measured speeds of the live workers that take this model's jobs, tokens per second."""
        return [
            worker.units_per_s[model]
            for worker, age_s in self.workers
            if worker.pool == pool and model in worker.units_per_s and age_s <= ALIVE_S
        ]

    def choose_pool(self, model: ModelInfo) -> PoolName:
        """Return the preferred pool that has a live worker, else the preferred one: the job waits there."""
        return next((pool for pool in model.pools if self.ready_workers(model.name, pool)), model.pools[0])


def _rows(values: Sequence[Sequence[float]] | None) -> tuple[tuple[float, ...], ...] | None:
    return None if values is None else tuple(map(tuple, values))


def _known(cls: type[Any], fields: Mapping[str, Any], **convert: Callable[[Any], Any]) -> dict[str, Any]:
    known = {name: value for name, value in fields.items() if name in cls.__dataclass_fields__}
    return known | {name: kind(known[name]) for name, kind in convert.items() if name in known}
