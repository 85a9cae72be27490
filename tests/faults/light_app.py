"""Penstock's own worker with an engine that needs no torch: `nap 0.5` takes half a second.

`gate inf` takes until the book has a key `gate`; `hang 2` shows no sign of life for two seconds;
`end-leases 0` ends the background thread `leases`.

Everything around the engine is the real one: app, transport, pool, tasks, batcher, results, registry.
"""

import ctypes
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import redis
from celery.signals import celeryd_after_setup
from numpy.typing import NDArray
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from penstock.request import EmbedRequest
from penstock.routing import TOKENS_PER_CHARACTER
from penstock_workers.batching.batcher import Batcher
from penstock_workers.batching.cuts import cut_by_tokens
from penstock_workers.configuration import load_settings
from penstock_workers.serving.app import build_app
from penstock_workers.serving.heartbeat import Heartbeat
from penstock_workers.serving.lifecycle import Lifecycle
from penstock_workers.serving.models import Served
from tests.announced import model

MODEL = "light"
DIM = 3

settings = load_settings().settings
# Reached without the proxies that a test may put in between.
BOOK = redis.Redis.from_url(os.environ["LIGHT_BOOK"], retry=Retry(ConstantBackoff(0.1), 600))
POOL, POOLS = os.environ["LIGHT_POOL"], tuple(os.environ["LIGHT_POOLS"].split(","))
# The runs in their order; what is written twice, because the connection was cut, is one.
WRITE_DOWN = BOOK.register_script("redis.call('ZADD', 'runs', 'NX', redis.call('ZCARD', 'runs'), ARGV[1])")


@dataclass(frozen=True, slots=True)
class Text:
    """A text as the engine takes it."""

    text: str

    @property
    def n_tokens(self) -> int:
        """As many as senders guess."""
        return math.ceil(len(self.text) * TOKENS_PER_CHARACTER)


class Engine:
    """Naps for as long as a text says, and writes down that it did."""

    dim = DIM
    int8_ranges = None

    def prepare(self, request: EmbedRequest) -> list[Text]:
        """See `Embedder.prepare`."""
        return [Text(text) for text in request.texts]

    def run(self, batch: Sequence[Text]) -> Iterator[tuple[int, NDArray[np.float32]] | None]:
        """See `Embedder.run`; shape (DIM,) each."""
        for index, item in enumerate(batch):
            name, seconds = item.text.split()
            WRITE_DOWN(args=[f"{name} {os.getpid()} {uuid.uuid4()}"])
            end = time.monotonic() + float(seconds)
            if name.startswith("end-"):
                end_thread(name.removeprefix("end-"))
            if name == "hang":
                time.sleep(float(seconds))
            while (rest_s := end - time.monotonic()) > 0 and not (rest_s == math.inf and BOOK.exists(name)):
                time.sleep(min(rest_s, 0.1))
                yield None  # a sign of life
            yield index, np.full(DIM, float(seconds), np.float32)


def end_thread(name: str) -> None:
    """Raise in a thread of this process what none of its handlers takes for an error."""
    (thread,) = [thread for thread in threading.enumerate() if thread.name == name]
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


INFO = model(MODEL, pools=POOLS, dim=DIM, max_tokens=None, max_texts=16)

app = build_app(settings)
app.steps["worker"].discard(Lifecycle)  # it loads torch
# How long until a connection that fell silent is given up, where the app has a limit: short, as the leases of
# these tests are.
options = app.conf.broker_transport_options
options.update(dict.fromkeys({"socket_timeout", "health_check_interval"} & options.keys(), 4))
app.conf.redis_socket_timeout = 4


@celeryd_after_setup.connect(weak=False)
def serve(**_: object) -> None:
    """Do what `Lifecycle` does, with the engine above."""
    engine = cast("Any", Engine())
    serving = app.penstock_serving
    batcher: Batcher[Any, Any] = Batcher(MODEL, engine.run, cut_by_tokens(1, is_padded=False))
    serving.models[MODEL] = Served(info=INFO, engine=engine, feed=batcher)
    Heartbeat(settings, serving, cast("Any", POOL), "cpu", [MODEL]).start()
