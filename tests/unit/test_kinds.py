"""Each kind of model (embed, generate, rerank) stands in every table that has a place for it.

Who adds a kind to `penstock.request.Task` learns here what is missing, before a job of that kind does.
"""

import dataclasses
from collections.abc import Iterable
from typing import get_args

import pytest
from celery import Celery

import penstock
from penstock.codec_fields import CHECKS
from penstock.messages import TASK_NAMES
from penstock.request import Request, Task
from penstock.result import Result
from penstock_workers.checkpoint.checks import FOREIGN_HEADS
from penstock_workers.command.stack import ENGINES
from penstock_workers.serving.models import DEFAULT_SHARES, Serving
from penstock_workers.serving.streams import Streams
from penstock_workers.serving.tasks import register_tasks
from tests.golden import make
from tests.structure import ROOT

KINDS = set(get_args(Task))


def recorded(what: str) -> set[str]:
    """Return the kinds that have a recording, of messages or of results."""
    return {name.split("-")[1] for name in make.recordings() if name.startswith(what)}


def calls(client: type) -> set[str]:
    """Return the kinds that a client can both wait for and send."""
    return {kind for kind in KINDS if hasattr(client, kind) and hasattr(client, f"submit_{kind}")}


@pytest.mark.parametrize(
    "found",
    [
        pytest.param([kind.task for kind in get_args(Request)], id="penstock.request.Request"),
        pytest.param([name.removeprefix("penstock.") for name in TASK_NAMES.values()], id="TASK_NAMES"),
        pytest.param(calls(penstock.AsyncClient), id="AsyncClient"),
        pytest.param(calls(penstock.Client), id="Client"),
        pytest.param(recorded("message"), id="messages of tests/golden/make.py"),
        pytest.param(recorded("result"), id="results of tests/golden/make.py"),
        pytest.param(DEFAULT_SHARES, id="serving.models.DEFAULT_SHARES"),
        pytest.param(FOREIGN_HEADS, id="checkpoint.checks.FOREIGN_HEADS"),
        pytest.param(ENGINES, id="command.stack.ENGINES"),
    ],
)
def test_every_kind_stands_in_every_table(found: Iterable[str]) -> None:
    """A kind that a table lacks would be a `KeyError` of some worker, some day."""
    assert set(found) == KINDS


def test_workers_have_a_task_for_every_kind() -> None:
    """A message of a kind without a task would be refused as unknown."""
    app = Celery(set_as_current=False)
    register_tasks(app, Serving(), (), Streams("redis://127.0.0.1:1/0", 1.0))

    assert {name for name in app.tasks if name.startswith("penstock.")} == set(TASK_NAMES.values())


def test_every_result_can_be_read() -> None:
    """The codec knows each result that a kind can have, and each of its fields."""
    assert len(get_args(Result)) == len(KINDS)
    assert set(get_args(Result)) - CHECKS.keys() == set()
    assert {cls: {field.name for field in dataclasses.fields(cls)} for cls in CHECKS} == {
        cls: set(checks) for cls, checks in CHECKS.items()
    }


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="tests a wheel: no documentation")
def test_every_kind_has_its_message_described() -> None:
    """Senders in other languages have that page alone."""
    told = (ROOT / "docs" / "reference" / "messages.md").read_text()

    assert {kind for kind in KINDS if f"`penstock.{kind}`" not in told} == set()
