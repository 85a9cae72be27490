"""`penstock status`: whether a deployment is ready, per worker and per model, and if not, why."""

import asyncio
import json
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click

from penstock.client import AsyncClient
from penstock.errors import PenstockError
from penstock.registry import ALIVE_S, Registry, WorkerInfo
from penstock.urls import mask_url
from penstock_workers.command.deployment import Deployment, deployment_options
from penstock_workers.preflight import check_servers
from penstock_workers.settings import Settings

_POLL_S: Final = 0.5


@click.command()
@deployment_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(config: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Say what is ready, or why not, per worker and model; exit 1 if a model is not."""
    deployment = Deployment(config, assignments).joined()
    models = deployment.stack.models if deployment.stack else ()
    found = read_status(deployment.loaded.settings, models)
    warnings = check_servers(deployment.loaded.settings)
    told = {
        **found.to_dict(),
        "redis": mask_url(deployment.loaded.settings.redis.broker_url),
        "warnings": warnings,
    }
    lines = [deployment.redis, *(f"warning: {warning}" for warning in warnings), *found.lines()]
    click.echo(json.dumps(told, indent=2) if as_json else "\n".join(lines))
    sys.exit(0 if found.is_ready else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One worker or model.

    Attributes:
        name: The worker's id, or the model's name.
        is_ready: True if it takes jobs.
        detail: Models and hardware of a worker, format and workers of a model; or the reason it is not ready.
    """

    name: str
    is_ready: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A deployment at one moment."""

    workers: tuple[Line, ...]
    models: tuple[Line, ...]

    @property
    def is_ready(self) -> bool:
        """True if every model has a worker that takes its jobs."""
        return bool(self.models) and all(line.is_ready for line in self.models)

    def to_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        return {"is_ready": self.is_ready, **asdict(self)}

    def lines(self) -> list[str]:
        """Return it for people."""
        rows = [*(("worker", line) for line in self.workers), *(("model", line) for line in self.models)]
        width = max((len(line.name) for _, line in rows), default=0)
        verdict = "ready" if self.is_ready else "not ready"
        return [
            f"{kind:6}  {line.name:{width}}  {'ready' if line.is_ready else 'NOT READY':9}  {line.detail}"
            for kind, line in rows
        ] + [verdict if rows else f"{verdict}: no worker has announced itself and no model is configured"]


def read_status(settings: Settings, expected: Sequence[str] = ()) -> Status:
    """Look at the registry.

    Args:
        settings: The deployment; its models are expected.
        expected: Models expected of a deployment that configures none; where this is empty too, every model
            that was ever announced.

    Raises:
        TransportError: Redis is out of reach, or refuses.
    """
    return judge(asyncio.run(_read(settings.broker_url)), tuple(settings.models) or tuple(expected))


def judge(registry: Registry, expected: tuple[str, ...]) -> Status:
    """Say who is ready."""
    workers = tuple(_worker_line(worker, age_s) for worker, age_s in registry.workers)
    names = expected or tuple(registry.models)
    return Status(workers=workers, models=tuple(_model_line(registry, name) for name in names))


async def wait_for_workers(url: str, pids: Callable[[], Sequence[int | None]]) -> None:
    """Wait, without a limit, until all processes of this machine that `pids` names take jobs."""
    async with AsyncClient(url) as client:
        while True:
            with suppress(PenstockError):
                workers = (await client.registry()).workers
                ready = {
                    worker.pid
                    for worker, age_s in workers
                    if (worker.host, worker.state) == (socket.gethostname(), "ready") and age_s <= ALIVE_S
                }
                if ready.issuperset(pids()):
                    return
            await asyncio.sleep(_POLL_S)


async def _read(url: str) -> Registry:
    async with AsyncClient(url) as client:
        return await client.registry()


def _worker_line(worker: WorkerInfo, age_s: float) -> Line:
    if age_s > ALIVE_S:
        return Line(name=worker.id, is_ready=False, detail=f"silent for {age_s:.0f} s: it died or lost Redis")
    if worker.state != "ready":
        reason = worker.note or f"{worker.state} {', '.join(worker.models)}"
        return Line(name=worker.id, is_ready=False, detail=reason)
    if not worker.models:
        return Line(name=worker.id, is_ready=False, detail="takes no jobs: all its queues were cancelled")
    memory = f"{worker.memory_bytes / 2**20:,.0f} MiB"
    return Line(
        name=worker.id, is_ready=True, detail=f"{', '.join(worker.models)} on {worker.device}, {memory}"
    )


def _model_line(registry: Registry, name: str) -> Line:
    model = registry.models.get(name)
    if model is None:
        return Line(name=name, is_ready=False, detail="no worker has announced it")
    counts = {pool: registry.ready_workers(name, pool) for pool in model.pools}
    where = ", ".join(f"{n} in {pool}" for pool, n in counts.items())
    if not any(counts.values()):
        return Line(name=name, is_ready=False, detail=f"no ready worker ({where}); its jobs wait")
    if trouble := registry.trouble(name):
        return Line(name=name, is_ready=False, detail=f"{trouble}; workers: {where}")
    shape = [f"{model.dim} dimensions"] if model.dim else []
    if not model.dim and model.max_tokens:
        shape = [f"context of {model.max_tokens} tokens"]
    return Line(
        name=name,
        is_ready=True,
        detail=f"{', '.join((model.task, model.dtype, *shape))}; workers: {where}",
    )
