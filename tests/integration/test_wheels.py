"""What people install: wheels that need no compiler, and installs from source without one."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from penstock_workers.hardware.machine import cpu_flags
from tests.deployment import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "hatch_build.py").exists(), reason="tests a wheel: no project")

HAS_COMPILER = shutil.which(os.environ.get("CC") or "cc") is not None
compiles = pytest.mark.skipif(
    sysconfig.get_platform() != "linux-x86_64" or not HAS_COMPILER, reason="nothing is compiled here"
)
SOURCE = ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore", "producer", "workers")
MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_x86_64")
OLDEST_FOR_TORCH = 28
"""torch's wheels ask for glibc 2.28: one that asks for a newer one would shut people out."""
EMBED = """
import sys
import numpy as np
import torch
from penstock.request import EmbedRequest
from penstock_workers.embedding.c_kernels import find_kernels
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.settings import ModelSettings
import penstock_workers
torch.set_num_threads(1)
settings = ModelSettings(task="embed", source="bundled:minilm", engine="torch")
engine = Embedder.load("minilm", settings, torch.device("cpu"))
texts = ["the water falls", "", "and turns the wheel " * 30]
answers = dict(filter(None, engine.run(engine.prepare(EmbedRequest(model="minilm", texts=texts)))))
np.save(sys.argv[1], np.stack([answers[place] for place in range(len(texts))]))
kernels = find_kernels(torch.device("cpu"), torch.float32)
print(penstock_workers.__file__, kernels is not None, engine.batching)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, without what was compiled here."""
    folder = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", ".*_cache", "*.so")
    for name in SOURCE:
        path = ROOT / name
        shutil.copytree(path, folder / name, ignore=skip) if path.is_dir() else shutil.copy(path, folder)
    return folder


def build(source: Path, to: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel; return it, and what the builder said."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(to)]
    done = subprocess.run(
        command, cwd=source, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = to.glob("*.whl")
    return wheel, done.stdout + done.stderr


def libraries(wheel: Path) -> list[str]:
    """Return the shared libraries in a wheel."""
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this machine's kind."""
    return build(source, tmp_path_factory.mktemp("wheel"))[0]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment that has the wheel; what it depends on comes from this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", str(wheel)], check=True, capture_output=True, timeout=120)
    # Files of the kind that make an editable install are not read in a folder that is added so.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def embed(python: Path, folder: Path, cache: Path, **environment: str) -> tuple[list[str], np.ndarray]:
    """Embed with the packages of an interpreter; return what it says of them, and vectors, shape (3, 384)."""
    file = folder / "vectors.npy"
    done = subprocess.run(
        [python, "-c", EMBED, str(file)],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(maxsplit=2), np.load(file)


@compiles
def test_a_wheel_for_linux_says_truly_where_it_runs(wheel: Path) -> None:
    """Its one library needs no newer glibc than its tag says, nor than torch does."""
    (glibc,) = MANYLINUX.findall(wheel.stem)

    assert wheel.stem.split("-")[2:4] == ["py3", "none"]
    assert wheel.stem.endswith("_x86_64")
    assert tuple(map(int, glibc)) <= (2, OLDEST_FOR_TORCH)
    assert len(libraries(wheel)) == 1
    assert "Root-Is-Purelib: false" in metadata(wheel, "WHEEL")


@compiles
def test_auditwheel_says_the_same(wheel: Path) -> None:
    """The program that knows the policies finds nothing that the tag does not allow."""
    pytest.importorskip("auditwheel")

    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    shown = re.search(f'platform tag: "{MANYLINUX.pattern}', " ".join(done.stdout.split()))

    assert shown is not None, done.stdout
    assert tuple(map(int, shown.groups())) <= tuple(map(int, MANYLINUX.findall(wheel.stem)[0]))


def metadata(wheel: Path, name: str) -> str:
    """Return a file of a wheel's `.dist-info`."""
    with zipfile.ZipFile(wheel) as opened:
        (path,) = (path for path in opened.namelist() if path.endswith(f".dist-info/{name}"))
        return opened.read(path).decode()


@compiles
@pytest.mark.timeout(240)
@pytest.mark.skipif(not {"avx512bw", "avx512_bf16"} <= cpu_flags(), reason="the CPU has no AVX-512 BF16")
def test_a_wheel_has_its_kernels_and_vectors_without_a_compiler(installed: Path, tmp_path: Path) -> None:
    """A machine that has nothing but Python computes in C, and what an install from source computes."""
    ours, theirs, empty = (tmp_path / name for name in ("source", "wheel", "empty"))
    for folder in (ours, theirs, empty):
        folder.mkdir()
    cache = tmp_path / "cache"
    folders = os.pathsep.join(str(ROOT / folder) for folder in ("producer", "workers"))

    (_, has_them, way), expected = embed(Path(sys.executable), ours, cache, PYTHONPATH=folders)
    (place, *found), vectors = embed(installed, theirs, cache, PATH=str(empty), CC="")

    assert Path(place).is_relative_to(installed.parents[1])
    assert found == ["True", way]
    if has_them == "True":  # the same code
        assert np.array_equal(vectors, expected)
    assert np.einsum("td,td->t", vectors, expected).min() > 0.9999


def test_a_wheel_for_other_machines_has_no_library(source: Path, tmp_path: Path) -> None:
    """It is for macOS, ARM, and whatever else has Python, and needs no compiler either."""
    wheel, _ = build(source, tmp_path, HATCH_BUILD_NO_HOOKS="true")

    assert wheel.stem.endswith("-py3-none-any")
    assert libraries(wheel) == []
    assert "Root-Is-Purelib: true" in metadata(wheel, "WHEEL")


@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="nothing is compiled here")
def test_a_build_without_a_compiler_says_what_it_loses(source: Path, tmp_path: Path) -> None:
    """It works, as a wheel for any machine, and says once what is missing and what to do."""
    wheel, said = build(source, tmp_path, CC="no-such-compiler")

    assert wheel.stem.endswith("-py3-none-any")
    assert libraries(wheel) == []
    assert said.count("the kernels are not compiled") == 1
    assert "no-such-compiler" in said
    assert "0.7 of the speed" in said


def test_the_workflow_installs_both_wheels_on_each_kind_of_machine() -> None:
    """What is published was installed where it will be, from wheels alone."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/build.yml").read_text())["jobs"]
    commands = {
        name: " ".join(step.get("run", "") for step in jobs[name]["steps"]) for name in ("wheels", "install")
    }

    assert commands["wheels"].count("pip wheel") == 2
    assert {"HATCH_BUILD_NO_HOOKS=true", "auditwheel", "show"} <= set(commands["wheels"].split())
    assert [name.split("-")[0] for name in jobs["install"]["strategy"]["matrix"]["runner"]] == [
        "ubuntu",
        "ubuntu",
        "macos",
    ]
    assert "--only-binary=:all:" in commands["install"]
