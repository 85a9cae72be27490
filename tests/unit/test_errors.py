import inspect
import json
import re
from collections.abc import Mapping, Sequence

import pytest

from penstock import errors
from penstock.codec import decode_outcome, encode_failure
from penstock.errors import PenstockError, UnknownModelError, WorkerError, error_classes, rebuild_error

EXAMPLES = {str: "grün", int: 7, float: 1.5, float | None: 2.5, Sequence[str]: ["first", "second"]}
EXAMPLES[Mapping[str, float] | None] = {"queued_s": 1.5}
CLASSES = [cls for cls in error_classes() if cls.__module__ == "penstock.errors"]


def fields(cls: type[PenstockError]) -> list[inspect.Parameter]:
    """Return what the constructor of ours takes; the base classes have Python's own."""
    if not inspect.isfunction(cls.__init__):
        return []
    return list(inspect.signature(cls).parameters.values())


def example_arguments(cls: type[PenstockError]) -> list[object]:
    """Return an argument for each field that the constructor names."""
    return [EXAMPLES[field.annotation] for field in fields(cls)] or ["what happened"]


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def error(request: pytest.FixtureRequest) -> PenstockError:
    """One error of each class."""
    cls: type[PenstockError] = request.param
    return cls(*example_arguments(cls))


def test_error_survives_the_result_store(error: PenstockError) -> None:
    """A caller gets the error the worker raised: class, arguments, fields and text."""
    job_id = str(EXAMPLES[str])  # a cancelled job's error is made of the id that is asked for

    back = decode_outcome(job_id, encode_failure(job_id, error)).error

    assert type(back) is type(error)
    assert back.args == error.args
    assert vars(back) == vars(error)
    assert str(back) == str(error)


def test_arguments_are_positional_and_json(error: PenstockError) -> None:
    """An error can be built again from its arguments, and JSON carries them unchanged."""
    given = example_arguments(type(error))

    assert list(error.args) == given
    assert json.loads(json.dumps(error.args)) == given
    assert all(field.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for field in fields(type(error)))


def test_text_holds_each_field(error: PenstockError) -> None:
    """What went wrong is told with the values that belong to it."""
    values = [value for name, value in vars(error).items() if not isinstance(value, tuple) and name != "text"]

    flat = [item for value in values for item in (value.values() if isinstance(value, dict) else [value])]

    assert str(error)
    assert all(str(value) in str(error) for value in flat)


def test_an_answer_is_not_quoted() -> None:
    """What an error tells of an incomplete answer, in a log or in Flower, holds no word of it."""
    error = errors.IncompleteOutputError(9, "swordfish")

    assert error.text == "swordfish"
    assert "swordfish" not in f"{error} {error!r}"


def test_module_docstring_shows_the_tree() -> None:
    """The tree that readers see names exactly the classes that exist, under their real parents."""
    shown: list[tuple[str, str]] = []
    parents: list[str] = []
    for line in (errors.__doc__ or "").split("```")[1].strip().splitlines():
        name = re.search(r"\w+Error", line)
        assert name is not None, line
        depth = name.start() // len("├── ")
        shown.append((name.group(), parents[depth - 1] if depth else "Exception"))
        parents[depth:] = [name.group()]

    assert sorted(shown) == sorted((cls.__name__, cls.__bases__[0].__name__) for cls in CLASSES)


def test_module_defines_no_error_outside_the_tree() -> None:
    """Every exception of the module is a `PenstockError`."""
    defined = {
        cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == "penstock.errors"
    }

    assert defined == set(CLASSES)


def test_unknown_class_becomes_a_worker_error() -> None:
    """A caller hears of an error that only a later version, or Celery, knows."""
    error = rebuild_error("FromTheFutureError", ["disk", 3])

    assert type(error) is WorkerError
    assert str(error) == "FromTheFutureError: disk, 3"


@pytest.mark.parametrize("args", [[], ["minilm"], ["minilm", 600, 512, "more"]])
def test_other_number_of_arguments_becomes_a_worker_error(args: list[object]) -> None:
    """A class that has other fields in another version is still told, by name."""
    error = rebuild_error("InputTooLongError", args)

    assert type(error) is WorkerError
    assert str(error).startswith("InputTooLongError: ")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("ResultTimeoutError", ["job", "soon"]),
        ("DeadlineExceededError", ["job", None]),
        ("UnknownModelError", ["minilm", [1, 2]]),
        ("ConfigError", [[1, 2]]),
        ("ConfigError", [5]),
    ],
)
def test_arguments_of_other_types_become_a_worker_error(name: str, args: list[object]) -> None:
    """An error whose text cannot be made of what came is still told, by name."""
    error = rebuild_error(name, args)

    assert type(error) is WorkerError
    assert str(error).startswith(f"{name}: ")


def test_foreign_exception_is_told_as_celery_stores_it() -> None:
    """A Python error that escaped a task reaches the caller with its name."""
    payload = encode_failure("job", PenstockError("x")).replace(b'"PenstockError"', b'"ZeroDivisionE"')

    outcome = decode_outcome("job", payload)

    assert outcome.status == "FAILURE"
    assert str(outcome.error) == "ZeroDivisionE: x"


def test_an_unknown_model_is_told_with_the_redis_that_was_asked() -> None:
    """And with where else stacks run; what workers of any version send is read alike."""
    here = rebuild_error("UnknownModelError", ["minilm", ["chat"]])
    empty = UnknownModelError("minilm", [], "redis://r:1/0", "process 5 in /x")

    assert str(here) == "model 'minilm' is not served here; known models: chat"
    assert here.args == ("minilm", ["chat"])
    assert str(empty) == (
        "model 'minilm' is not served at redis://r:1/0; known models: none: no worker has announced a model "
        "yet; a stack of this user runs elsewhere: process 5 in /x"
    )


def test_only_the_workers_and_redis_faults_are_retryable() -> None:
    """Whether to retry is the class's own attribute; a caller's fault never is."""
    retryable = {cls.__name__ for cls in CLASSES if cls.retryable}

    assert retryable == {
        "WorkerError",
        "EngineError",
        "UpstreamAnswerError",
        "UpstreamError",
        "UpstreamUnavailableError",
        "WorkerLostError",
        "TransportError",
        "BrokerUnavailableError",
        "ResultTimeoutError",
        "QueueDelayError",
        "RateLimitError",
    }
