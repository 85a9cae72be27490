"""Workers on another system and processor: what only Linux on x86-64 has is missing, as on a Mac with ARM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployment import ROOT

AS_ON_A_MAC = """
import asyncio, builtins, io, json, os, platform, pkgutil, socket, sys
from importlib import import_module
{first}

def without_linux(call):
    def asked(path, *arguments, **options):
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "no such file", str(path))
        return call(path, *arguments, **options)
    return asked

os.stat, io.open = without_linux(os.stat), without_linux(io.open)
builtins.open = io.open
sys.platform, platform.machine, platform.system = "darwin", lambda: "arm64", lambda: "Darwin"
platform.processor = lambda: "arm"
for module, names in ((os, ("sched_getaffinity", "sched_setaffinity", "memfd_create", "pidfd_open", "eventfd",
                            "posix_fadvise")), (socket, ("SOCK_SEQPACKET", "SO_PEERCRED", "TCP_KEEPIDLE"))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

"""
MODELS = "import celery.bin.celery, celery.bin.worker, sentence_transformers, torch"
"""Libraries that look at the machine as they are imported."""
LOOK = """
import penstock, penstock_workers
for package in (penstock, penstock_workers):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        others = ("__main__", "llama_index", "langchain", "lightrag", "triton_kernels")
        if not found.name.endswith(others) and "kernels-" not in found.name:
            import_module(found.name)
from penstock_workers.command.forkserver import tie_to_parent
from penstock_workers.embedding.c_kernels import find_kernels
from penstock_workers.embedding.c_library import missing_reason
from penstock_workers.hardware import machine
from penstock_workers.hardware.device import has_fast_bfloat16
from penstock_workers.serving.heartbeat import _memory_bytes
torch.set_num_threads(1)
cpu = torch.device("cpu")
here = machine.read_machine()
print(json.dumps({
    "cores": here.cores, "memory": here.memory_bytes, "free": machine.free_bytes(),
    "pss": machine.pss_bytes(), "flags": sorted(machine.cpu_flags()), "name": machine.cpu_name(),
    "resident": _memory_bytes(), "ties": tie_to_parent() is not None, "missing": missing_reason(),
    "kernels": find_kernels(cpu, torch.float32) is not None, "bfloat16": has_fast_bfloat16(cpu),
}))
"""
EMBED = """
from penstock.request import EmbedRequest
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.embedding.shared_weights import share
from penstock_workers.settings import ModelSettings
torch.set_num_threads(1)
settings = ModelSettings(task="embed", source="bundled:minilm", engine="torch")
engine = Embedder.load("minilm", settings, torch.device("cpu"))
request = EmbedRequest(model="minilm", texts=["the water falls", "and turns the wheel"])
answers = dict(filter(None, engine.run(engine.prepare(request))))
expected = engine._model.encode(request.texts)
shared, = share([torch.arange(100.0)])
print(json.dumps({
    "way": engine.batching, "cosines": [float(answers[i] @ expected[i]) for i in (0, 1)],
    "shared": bool((shared == torch.arange(100.0)).all()),
}))
"""
SUPERVISE = """
from penstock_workers.command.child import Child
from penstock_workers.command.forkserver import Preload
from penstock_workers.command.supervisor import Supervisor
lines = []
async def main():
    stop = asyncio.Event()
    def write(line):
        lines.append(line)
        stop.set()
    program = "print('up'); import signal; signal.pause()"
    command = [sys.executable, "-m", "tests.integration.program", program]
    child = Child(name="one", command=command, environment={}, stage=1, preload=Preload(modules=("decimal",)))
    return await Supervisor([child], drain_s=5, write=write).run(stop)
print(json.dumps({"code": asyncio.run(main()), "lines": lines}))
"""


def run(program: str, tmp_path: Path, *, first: str = MODELS) -> dict[str, object]:
    """Run a program where Linux and x86-64 are missing after its first imports; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AS_ON_A_MAC.replace("{first}", first) + program],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_machine_that_tells_little_is_read(tmp_path: Path) -> None:
    """All modules are imported; cores, memory and CPU are what any system tells, and no C is looked for."""
    found = run(LOOK, tmp_path)

    assert found["cores"] == os.cpu_count()
    assert found["memory"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found["free"] == found["memory"]
    assert isinstance(found["resident"], int)
    assert found["resident"] > 0
    assert found["name"] == "arm"
    assert (found["pss"], found["flags"], found["ties"], found["bfloat16"]) == (None, [], False, False)
    assert (found["kernels"], found["missing"]) == (False, None)


def test_texts_are_embedded_by_torch(tmp_path: Path) -> None:
    """Vectors are those of sentence-transformers, in float32; weights are shared by a file's name."""
    found = run(EMBED, tmp_path)

    assert found["cosines"] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert found["shared"] is True
    assert found["way"] == "packed"


def test_children_are_started_by_themselves(tmp_path: Path) -> None:
    """Forks are Linux' alone: the supervisor starts, hears and stops programs anywhere."""
    assert run(SUPERVISE, tmp_path, first="") == {"code": 0, "lines": ["one | up"]}
