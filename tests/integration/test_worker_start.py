"""A worker that cannot do its work does not start: a non-zero code and one clear line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.extras import how_to_install
from penstock_workers.bundled import bundled_folder
from penstock_workers.serving.lifecycle import EXIT_CONFIG
from tests.deployment import BUNDLED, ROOT, Server, WorkerProcess
from tests.eventually import eventually
from tests.models.odd_models import change_json, drop_weights

MODEL = '[models.broken]\ntask = "embed"\nsource = "{}"\n'


def missing(folder: Path) -> str:
    return MODEL.format(folder / "nowhere")


def empty(folder: Path) -> str:
    (folder / "empty").mkdir()
    return MODEL.format(folder / "empty")


def truncated(folder: Path) -> str:
    shutil.copytree(bundled_folder("minilm"), folder / "truncated")
    weights = next((folder / "truncated").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return MODEL.format(folder / "truncated")


def remote_code(folder: Path) -> str:
    target = folder / "remote"
    shutil.copytree(bundled_folder("minilm"), target)
    config = json.loads((target / "config.json").read_text())
    config |= {
        "model_type": "surprise",
        "auto_map": {"AutoConfig": "surprise.Config", "AutoModel": "surprise.Model"},
    }
    (target / "config.json").write_text(json.dumps(config))
    (target / "surprise.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    return MODEL.format(target)


def not_there(folder: Path) -> str:
    return MODEL.format("bundled:gigantic")


def headless(folder: Path) -> str:
    return MODEL.format("bundled:minilm").replace("embed", "rerank")


def full_of_holes(folder: Path) -> str:
    target = folder / "holes"
    shutil.copytree(bundled_folder("minilm"), target)
    drop_weights(target, lambda key: "layer.4." in key)
    return MODEL.format(target)


def wrong_options(folder: Path) -> str:
    target = folder / "wrong"
    shutil.copytree(bundled_folder("tiny-chat"), target)
    change_json(target / "generation_config.json", eos_token_id=1 << 30)
    return MODEL.format(target).replace("embed", "generate")


def wordless(folder: Path) -> str:
    target = folder / "wordless"
    shutil.copytree(bundled_folder("tiny-chat"), target)
    (target / "chat_template.jinja").write_text("{{ messages[1].content }}")
    return MODEL.format(target).replace("embed", "generate")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (wrong_options, "eos_token_id: 1073741824 is no token"),
        (wordless, "its chat template refuses a question: UndefinedError"),
        (headless, "2 weights are missing in its files, the first is classifier.bias"),
        (full_of_holes, "16 weights are missing in its files, the first is encoder.layer.4."),
        (missing, "does not exist"),
        (empty, "is empty"),
        (truncated, "broken"),
        (remote_code, "needs Python code of its own"),
        (not_there, "is not one of bundled:minilm"),
    ],
)
def test_a_model_that_does_not_load_ends_the_worker(
    server: Server, tmp_path: Path, make: Callable[[Path], str], reason: str
) -> None:
    """The worker ends before it takes a job, and says why in one line without a traceback."""
    worker = WorkerProcess(tmp_path, server, toml=make(tmp_path), queues="cpu.broken")

    code = worker.wait()

    critical = [line for line in worker.log.splitlines() if "CRITICAL" in line]
    assert code == EXIT_CONFIG, worker.log
    assert len(critical) == 1
    assert "model 'broken' cannot be loaded" in critical[0]
    assert reason in critical[0]
    assert "Traceback" not in worker.log
    assert "ready." not in worker.log
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("queues", "options", "environment", "reason"),
    [
        ("cpu.nope", (), {}, "queue 'cpu.nope' is of no model; queues: cpu.chat, cpu.minilm"),
        ("cpu.minilm", ("-P", "prefork"), {}, "pool prefork is refused: a forked child cannot use CUDA"),
        ("cpu.minilm", ("-P", "solo"), {}, "pool solo is refused"),
        ("cpu.minilm", ("--autoscale", "4,1"), {}, "--autoscale changes nothing"),
        ("cpu.minilm", (), {"PENSTOCK_POOLS__CPU__PROCESES": "3"}, "is PROCESSES meant?"),
        ("cpu.minilm", (), {"PENSTOCK_CONFIG": "/nowhere.toml"}, "/nowhere.toml"),
        ("gpu.minilm,cpu.chat", (), {"PENSTOCK_MODELS__MINILM__POOLS": '["gpu"]'}, "queues of two pools"),
    ],
)
def test_a_wrong_start_is_refused(
    server: Server,
    tmp_path: Path,
    queues: str,
    options: tuple[str, ...],
    environment: dict[str, str],
    reason: str,
) -> None:
    """Unknown queues, pools that fork, misspelled settings: refused at once, with what is allowed."""
    worker = WorkerProcess(
        tmp_path, server, toml=BUNDLED, queues=queues, options=options, environment=environment
    )

    code = worker.wait()

    assert code == EXIT_CONFIG, worker.log
    assert reason in worker.log
    assert "Traceback" not in worker.log


HIDDEN = "import sys; sys.modules.update(torch=None, transformers=None, sentence_transformers=None); "
"""Begins a program on a machine where what runs models is not installed."""


def test_a_missing_library_is_told_by_its_extra(server: Server, tmp_path: Path) -> None:
    """`celery -A penstock_workers` where Celery alone is installed: one line, and no traceback."""
    program = ("-c", HIDDEN + "from celery.__main__ import main; main()")
    worker = WorkerProcess(
        tmp_path, server, toml=BUNDLED, queues="cpu.minilm", program=program, is_warm=False
    )

    code = worker.wait()

    critical = [line for line in worker.log.splitlines() if "CRITICAL" in line]
    assert code == EXIT_CONFIG, worker.log
    assert len(critical) == 1
    assert critical[0].endswith(f"torch is missing: {how_to_install('workers')}")
    assert "Traceback" not in worker.log


def test_a_worker_of_remote_models_needs_no_torch(server: Server, tmp_path: Path) -> None:
    """`penstock worker` asks for what its own models need, and for nothing else."""
    config = tmp_path / "remote.toml"
    config.write_text(
        f'[redis]\nbroker_url = "{server.broker_url}"\nresults_url = "{server.results_url}"\n{BUNDLED}'
        '[models.far]\ntask = "embed"\nengine = "remote"\nsource = "http://127.0.0.1:9/v1"\n'
        'remote = { model = "far", dim = 8 }\n'
    )
    log = tmp_path / "log"
    command = [sys.executable, "-c", HIDDEN + "from penstock_workers.cli import main; main()", "worker"]
    command += ["--config", str(config), "--pool", "cpu"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--model", "far"], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        eventually(lambda: process.poll() is not None or "ready." in log.read_text(), within_s=60)
        assert "ready." in log.read_text()
    finally:
        process.terminate()
        process.wait(30)

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.returncode == os.EX_CONFIG
    assert done.stderr == f"this machine cannot run models yet: {how_to_install('workers')}\n"


@pytest.mark.parametrize("command", [("worker", "--pool", "cpu"), ("up",)], ids=lambda words: words[0])
def test_a_start_without_standard_files(server: Server, tmp_path: Path, command: tuple[str, ...]) -> None:
    """What starts it may have closed input, output and errors."""
    config, heartbeat = tmp_path / "remote.toml", tmp_path / "ready"
    config.write_text(
        f'[redis]\nbroker_url = "{server.broker_url}"\nresults_url = "{server.results_url}"\n'
        f'[worker]\nheartbeat_file = "{heartbeat}"\n[pools.cpu]\nprocesses = 1\n[flower]\nport = 0\n'
        '[models.far]\ntask = "embed"\nengine = "remote"\nsource = "http://127.0.0.1:9/v1"\n'
        'remote = { model = "far", dim = 8 }\n'
    )
    penstock = str(Path(sys.executable).with_name("penstock"))
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", penstock, *command, "--config", str(config)]
    process = subprocess.Popen(closed, cwd=tmp_path)
    try:
        eventually(lambda: process.poll() is not None or heartbeat.exists(), within_s=60)
        assert heartbeat.exists()
    finally:
        process.terminate()
        process.wait(30)


def test_options_of_celery_without_effect_are_refused(server: Server, tmp_path: Path) -> None:
    """Each option of `celery worker` that means nothing here is named, with what to do instead."""
    options = {
        "--autoscale": "4,1",
        "--time-limit": "5",
        "--soft-time-limit": "5",
        "--max-tasks-per-child": "5",
        "--max-memory-per-child": "5",
        "--pool-start-method": "spawn",
        "--prefetch-multiplier": "4",
        "--disable-prefetch": None,
        "-B": None,
    }
    words = [word for option in options.items() for word in option if word]
    worker = WorkerProcess(tmp_path, server, toml=BUNDLED, queues="cpu.minilm", options=tuple(words))

    code = worker.wait()

    assert code == EXIT_CONFIG, worker.log
    critical = [line for line in worker.log.splitlines() if "CRITICAL" in line]
    assert all(any(option in line for line in critical) for option in options), worker.log
    assert "Traceback" not in worker.log


def test_a_gpu_pool_without_a_gpu_is_refused(server: Server, tmp_path: Path) -> None:
    """Pool `gpu` never falls back to a CPU by itself."""
    toml = BUNDLED.replace('source = "bundled:minilm"', 'source = "bundled:minilm"\npools = ["gpu"]')
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    worker = WorkerProcess(tmp_path, server, toml=toml, queues="gpu.minilm", environment=hidden)

    code = worker.wait()

    assert code == EXIT_CONFIG, worker.log
    assert "neither CUDA nor MPS" in worker.log
    assert 'pools.gpu.device = "cpu"' in worker.log


def test_a_gpu_pool_on_a_cpu_serves_its_queues(server: Server, tmp_path: Path) -> None:
    """With `device = "cpu"` the GPU pool's routing can be tried without a GPU."""
    toml = '[pools.gpu]\ndevice = "cpu"\n' + MODEL.format("bundled:minilm").replace("broken", "onlygpu")
    toml += 'engine = "torch"\npools = ["gpu"]\n'
    worker = WorkerProcess(tmp_path, server, toml=toml, queues="gpu.onlygpu")
    try:
        worker.wait_until_ready()
        from penstock import Client

        with Client(server.broker_url) as client:
            assert client.embed(["a"], model="onlygpu", timeout_s=30).shape == (1, 384)
    finally:
        worker.stop()


def test_only_the_models_of_the_queues_are_loaded(server: Server, tmp_path: Path) -> None:
    """`-Q cpu.chat` loads the chat model alone, before `ready`, and SIGTERM ends it with 0."""
    worker = WorkerProcess(tmp_path, server, toml=BUNDLED, queues="cpu.chat")
    try:
        worker.wait_until_ready()
        eventually(lambda: "ready." in worker.log)
        lines = worker.log.splitlines()
        loaded = next(i for i, line in enumerate(lines) if "model chat loaded" in line)
        ready = next(i for i, line in enumerate(lines) if line.endswith("ready."))

        worker.process.terminate()
        code = worker.wait(30)

        assert loaded < ready
        assert "minilm" not in "".join(line for line in lines if "loaded" in line)
        assert code == 0
        assert not worker.heartbeat_file.exists()
    finally:
        worker.stop()


def test_the_short_form_is_the_same_worker(server: Server, tmp_path: Path) -> None:
    """`penstock worker --pool cpu --model chat` takes the queue cpu.chat and nothing else."""
    config = tmp_path / "short.toml"
    config.write_text(
        f'[redis]\nbroker_url = "{server.broker_url}"\nresults_url = "{server.results_url}"\n{BUNDLED}'
    )
    command = [str(Path(sys.executable).with_name("penstock")), "worker", "--pool", "cpu", "--model", "chat"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--config", str(config), "-c", "3"],
            cwd=ROOT,
            env={**os.environ, "NO_COLOR": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        eventually(lambda: "ready." in log.read_text(), within_s=60)

        assert "cpu.chat" in log.read_text()
        assert "cpu.minilm" not in log.read_text()
        assert "concurrency: 3" in log.read_text()
    finally:
        process.terminate()
        process.wait(30)
