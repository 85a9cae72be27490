import json
from dataclasses import asdict, replace

import pytest

from penstock.errors import ConfigError
from penstock.registry import ALIVE_S, ModelInfo, Registry, WorkerInfo, WorkerState
from penstock.routing import predict
from penstock.urls import announce_results, locate_results, mask_url
from tests.announced import model, worker

MODEL = model(pools=("gpu", "cpu"))
CPU = worker()
GPU = replace(CPU, id="gpu@host:2", pid=2, pool="gpu", device="cuda:0")


def registry(*workers: tuple[WorkerInfo, float]) -> Registry:
    """Return a registry of one model and these workers, each with its age in seconds."""
    return Registry(models={"minilm": MODEL}, workers=workers, results="/1")


# Choosing a pool


def test_preferred_pool_with_a_ready_worker_is_chosen() -> None:
    """Jobs go to the first pool of the model that takes them."""
    assert registry((CPU, 0.0), (GPU, 0.0)).choose_pool(MODEL) == "gpu"


def test_next_pool_takes_the_jobs_where_the_preferred_one_has_no_worker() -> None:
    """Without a GPU the CPUs do the work."""
    assert registry((CPU, 0.0)).choose_pool(MODEL) == "cpu"


def test_jobs_wait_in_the_preferred_pool_where_no_worker_is_left() -> None:
    """A known model's jobs are accepted when its workers are gone."""
    assert registry().choose_pool(MODEL) == "gpu"


@pytest.mark.parametrize("state", ["loading", "stalled", "stopping"])
def test_workers_that_are_not_ready_do_not_count(state: WorkerState) -> None:
    """A pool whose workers take no jobs gets none."""
    gpu = replace(GPU, state=state)

    assert registry((CPU, 0.0), (gpu, 0.0)).choose_pool(MODEL) == "cpu"
    assert registry((gpu, 0.0)).ready_workers("minilm", "gpu") == 0


def test_silent_workers_do_not_count() -> None:
    """A worker whose heartbeat stopped counts until `ALIVE_S`, and no longer."""
    assert registry((GPU, ALIVE_S)).ready_workers("minilm", "gpu") == 1
    assert registry((GPU, ALIVE_S + 0.1)).ready_workers("minilm", "gpu") == 0
    assert registry((GPU, ALIVE_S + 0.1), (CPU, 0.0)).choose_pool(MODEL) == "cpu"


def test_workers_of_other_models_do_not_count() -> None:
    """A pool is chosen for a model, not for itself."""
    gpu = replace(GPU, models=("chat",))

    assert registry((CPU, 0.0), (gpu, 0.0)).choose_pool(MODEL) == "cpu"


# Reading


def test_registry_is_read_as_workers_write_it() -> None:
    """The three keys and Redis' own time give models, workers and their ages."""
    beats = {
        b"gpu@host:2": b"1000\n" + GPU.to_json().encode(),
        b"cpu@host:1": b"990\n" + CPU.to_json().encode(),
    }

    read = Registry.read({b"minilm": MODEL.to_json().encode()}, beats, b"/1", 1002.5)

    assert read == registry((CPU, 12.5), (GPU, 2.5))


def test_empty_registry_is_read() -> None:
    """Before the first worker there is nothing, and that is no error."""
    assert Registry.read({}, {}, None, 1.0) == Registry(models={}, workers=(), results=None)


def test_fields_of_a_later_version_are_left_out() -> None:
    """Workers may be upgraded before clients."""
    model = json.dumps(asdict(MODEL) | {"modality": ["text", "image"], "price": None}).encode()
    worker = json.dumps(asdict(CPU) | {"power_w": 300}).encode()

    read = Registry.read({b"minilm": model}, {b"cpu@host:1": b"5\n" + worker}, None, 5.0)

    assert read.models == {"minilm": MODEL}
    assert read.workers == ((CPU, 0.0),)
    assert ModelInfo.from_json(model.decode()) == MODEL


def test_model_info_survives_json() -> None:
    """A client sees what the worker announced, types included."""
    assert ModelInfo.from_json(MODEL.to_json()) == MODEL
    assert isinstance(ModelInfo.from_json(MODEL.to_json()).pools, tuple)


# Where results are kept


@pytest.mark.parametrize(
    ("broker", "results", "announced"),
    [
        ("redis://r:6379/0", "redis://r:6379/1", "/1"),
        ("redis://r/0", "redis://r:6379/1", "/1"),
        ("redis://r:6379", "redis://r:6379", "/0"),
        ("redis://:pw@r:6379/0", "redis://u:other@r:6379/5", "/5"),
        ("redis://R:6379/0", "redis://r:6379/1", "/1"),
        ("redis://r:6379/0", "redis://r:6380/0", "redis://r:6380/0"),
        ("redis://r:6379/0", "rediss://u:secret@other:6380/2", "rediss://other:6380/2"),
        ("redis://[::1]:6379/0", "redis://:pw@[::2]:6379/0", "redis://[::2]:6379/0"),
    ],
)
def test_results_are_announced_without_credentials(broker: str, results: str, announced: str) -> None:
    """Clients hear a path on the same server, or another server's address, and never a password."""
    assert announce_results(broker, results) == announced


@pytest.mark.parametrize(
    ("broker", "announced", "located"),
    [
        ("redis://127.0.0.1:7000/0", "/1", "redis://127.0.0.1:7000/1"),
        ("rediss://me:pw@tunnel:7000/0", "/1", "rediss://me:pw@tunnel:7000/1"),
        ("redis://r", "/1", "redis://r/1"),
        ("redis://:p%40w@[::1]:6379/0", "/7", "redis://:p%40w@[::1]:6379/7"),
        (
            "rediss://me:pw@r:6379/0?ssl_ca_certs=/ca.pem",
            "/1",
            "rediss://me:pw@r:6379/1?ssl_ca_certs=/ca.pem",
        ),
        ("unix://:pw@/run/redis.sock?db=0", "/1", "unix://:pw@/run/redis.sock?db=1"),
        ("rediss://me:pw@r:6379/0", "redis://R:6379/2", "rediss://me:pw@r:6379/2"),
    ],
)
def test_clients_find_results_with_their_own_credentials(broker: str, announced: str, located: str) -> None:
    """The name under which a client reaches the server, and its own password, are kept."""
    assert locate_results(broker, announced) == located


def test_what_is_announced_is_found() -> None:
    """A client that reaches the workers' server by their name ends where they do."""
    broker, results = "redis://:pw@r:6379/0", "redis://:pw@r:6379/3"

    assert locate_results(broker, announce_results(broker, results)) == results


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://r:6379/0", "redis://r:6379/0"),
        ("redis://:secret@r:6379/0", "redis://:***@r:6379/0"),
        ("rediss://me:secret@r/0?a=b", "rediss://me:***@r/0?a=b"),
        ("redis://:s%40e@[::1]:6379/0", "redis://:***@[::1]:6379/0"),
        ("redis://:p@ss@r:6379/0", "redis://:***@r:6379/0"),
        ("redis://:secret@[::1/0", "(not a URL)"),
    ],
)
def test_passwords_are_masked(url: str, masked: str) -> None:
    """What is logged or raised names the server and not its password."""
    assert mask_url(url) == masked


def test_certificate_files_are_not_announced() -> None:
    """Paths of a worker's machine stay there; a client finds its own in the URL that it was given."""
    results = "rediss://worker:s3cret@results:6379/1?ssl_ca_certs=/worker/ca.pem&ssl_cert_reqs=required"

    announced = announce_results("rediss://broker:6379/0?ssl_ca_certs=/worker/ca.pem", results)

    assert announced == "rediss://results:6379/1?ssl_cert_reqs=required"


@pytest.mark.parametrize(
    "announced",
    [
        "redis://other:6380/2",
        "redis://r:6380/2",
        "rediss://other/0?ssl_cert_reqs=none&ssl_check_hostname=false",
        "sentinel://r:6379/0?master_name=main",
        "unix:///run/other.sock",
        "/1?ssl_cert_reqs=none",
        "/../2",
        "//other/1",
        "",
        "nonsense",
    ],
)
def test_another_server_has_to_be_named_by_the_client(announced: str) -> None:
    """A login goes to the broker's own server alone; the error says how another one is named."""
    with pytest.raises(ConfigError, match=r"results_url: .*Client\(url, results_url=...\)") as caught:
        locate_results("redis://me:hush@r:6379/0", announced)

    assert "hush" not in str(caught.value)


def test_a_speed_that_is_not_measured_is_not_told_as_none() -> None:
    """Right after the start the wait is known, since nothing waits, and the speed is not."""
    live = Registry(models={"m": model("m")}, workers=[(worker(models=("m",)), 0.0)], results=None)
    known = replace(predict("cpu.m", [1, 50, 0, 50], live), predicted_wait_s=0.5, tokens_per_s=100.0)

    assert str(predict("cpu.m", [0, 0, 0, 0], live)) == (
        "cpu.m: 0.00 s, 0 tokens before it, speed of 1 workers not measured yet"
    )
    assert str(predict("cpu.m", [1, 50, 0, 50], live)) == (
        "cpu.m: unknown, 1 workers have not told their speed"
    )
    assert str(known) == "cpu.m: 0.50 s, 50 tokens before it, 100 tokens/s of 1 workers"
