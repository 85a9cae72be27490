"""What a client learns from the registry: which models are served, and where results are kept."""

import asyncio
from typing import Final

from penstock.broker import Broker
from penstock.calls import Calls
from penstock.clock import ticks
from penstock.connections import connect
from penstock.errors import UnknownModelError, WrongTaskError
from penstock.inbox import Inbox
from penstock.registry import HEARTBEAT_S, ModelInfo, Registry
from penstock.request import Task, new_job_id
from penstock.result_store import ResultStore
from penstock.stacks import tell_elsewhere
from penstock.urls import locate_results, mask_url

REGISTRY_TTL_S: Final = 5.0
"""How long one reading of the registry is used, seconds."""
LOOK_AGAIN_S: Final = 0.25
"""Pause between looks for a model that the registry may have lost, seconds."""


class Discovery:
    """The registry as one client sees it. Belongs to one event loop."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._registry: Registry | None = None
        self._read_at = 0.0
        self._reading: asyncio.Task[Registry] | None = None
        self._known: set[str] = set()  # models that were ever served here

    async def registry(self, *, max_age_s: float = REGISTRY_TTL_S) -> Registry:
        """Return models and workers as they were `max_age_s` ago at most.

        Raises:
            TransportError: the broker cannot be reached, or refuses.
        """
        if self._registry is None or ticks() - self._read_at > max_age_s:
            # One reading for all who want one now: they also go on together, and may share a job.
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._broker.registry(), name="penstock-registry")
            self._registry = await asyncio.shield(self._reading)
            self._read_at = ticks()
            self._known |= self._registry.models.keys()
        return self._registry

    async def find(self, name: str, task: Task | None = None) -> ModelInfo:
        """Return a model by its name.

        Raises:
            UnknownModelError: no worker announced it.
            WrongTaskError: the model does not do this task.
        """
        registry = await self.registry()
        if name not in registry.models:
            registry = await self.registry(max_age_s=0)
        ends_at = ticks() + 2 * HEARTBEAT_S
        while name not in registry.models and name in self._known and ticks() < ends_at:
            # The server has lost it, and the next heartbeat of its workers announces it again.
            await asyncio.sleep(LOOK_AGAIN_S)
            registry = await self.registry(max_age_s=0)
        model = registry.models.get(name)
        if model is None:
            url = self._broker.url
            elsewhere = "" if registry.models else tell_elsewhere(url)
            raise UnknownModelError(name, sorted(registry.models), mask_url(url), elsewhere)
        if task is not None and model.task != task:
            raise WrongTaskError(name, model.task, task)
        return model

    def n_workers(self, name: str) -> int:
        """Return how many workers took a model's jobs at the last look."""
        registry = self._registry
        model = registry.models.get(name) if registry else None
        return registry.ready_workers(name, registry.choose_pool(model)) if registry and model else 0

    def max_texts(self, name: str) -> int:
        """Return how many texts a job of a model may have, as of the last look."""
        model = self._registry.models.get(name) if self._registry else None
        return model.max_texts if model else 1


class StoreFinder:
    """Opens the result store where workers announced it, and elsewhere once it has moved.

    Args:
        discovery: knows what workers announced.
        broker_url: Redis that holds the queues; results may lie in another database there.
        results_url: Redis that holds the results; None takes what workers announced.
        calls: calls of the client that waits for results.
        connect_timeout_s: time limit of a connection, seconds.
    """

    def __init__(
        self,
        discovery: Discovery,
        broker_url: str,
        results_url: str | None,
        calls: Calls,
        *,
        connect_timeout_s: float,
    ) -> None:
        self._discovery, self._calls = discovery, calls
        self._broker_url, self._results_url = broker_url, results_url
        self._connect_timeout_s = connect_timeout_s
        self._client_id = new_job_id()
        self._store: ResultStore | None = None
        self._is_guessed = True  # where results are
        self._opening = asyncio.Lock()

    async def open(self) -> ResultStore:
        """Return the store, connected, and with its inbox open.

        Raises:
            TransportError: the store cannot be reached, or refuses.
            ConfigError: results are at another server, which the client was not told.
        """
        async with self._opening:
            if self._is_guessed or self._store is None:
                url = await self._locate()
                if self._store is not None and self._store.url != url:
                    await self._store.close()
                    self._store = None
                if self._store is None:
                    self._store = await self._connect(url)
            return self._store

    async def close(self) -> None:
        """Close what is open."""
        if self._store is not None:
            await self._store.close()

    async def _locate(self) -> str:
        # Before the first worker, or after a loss, nobody says where: then it is looked up again.
        announced = (await self._discovery.registry()).results
        url = self._results_url or locate_results(self._broker_url, announced or "/1")
        self._is_guessed = announced is None and self._results_url is None
        return url

    async def _connect(self, url: str) -> ResultStore:
        results = connect(url, connect_timeout_s=self._connect_timeout_s)
        store = ResultStore(results, url, Inbox(results, url, self._client_id), self._calls)
        try:
            await store.inbox.open()
        except BaseException:
            self._calls.later(store.close())
            raise
        return store
