"""Linux and x86-64 are assumed where a file says so, and has something else for other machines."""

import re

import pytest

from tests import structure
from tests.structure import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "producer").is_dir(), reason="tests a wheel: no source folders")

TIED = re.compile(
    r"/proc\b|/sys/|/dev/|cpuinfo|cgroup|sched_\w*affinity|pthread_setaffinity|prctl|PDEATHSIG|pidfd|signalfd|memfd"
    r"|select\.epoll|inotify|eventfd|SEQPACKET|SO_PEERCRED|TCP_KEEP\w+|TCP_QUICKACK|MSG_NOSIGNAL|posix_fadvise|madvise"
    r"|mincore|RLIMIT_\w+|malloc_trim|ctypes\.CDLL|find_library|sys\.platform|platform\.(?:machine|system|processor)"
    r"|\bavx\w*|\bamx\w*|\bfcntl\b|\bimport resource\b|SC_PHYS_PAGES"
)
"""What only some systems or processors have."""

FALLBACKS = {
    "producer/penstock/stacks.py": "fcntl: without it no stack is found, and none runs",
    "workers/penstock_workers/command/forkserver.py": "made on Linux alone, and so are ties to the parent",
    "workers/penstock_workers/command/supervisor.py": "elsewhere each child is started by itself",
    "workers/penstock_workers/embedding/c_kernels.py": "torch computes where the library cannot be loaded",
    "workers/penstock_workers/embedding/c_library.py": "nothing is for a CPU whose flags are not known",
    "workers/penstock_workers/embedding/measured.py": "part of a key, whatever it says",
    "workers/penstock_workers/embedding/shared_weights.py": "macOS has flock too; by name without /proc",
    "workers/penstock_workers/hardware/device.py": "float32 where the CPU's flags are not known",
    "workers/penstock_workers/hardware/machine.py": "all cores, the memory's size, and no flags elsewhere",
    "workers/penstock_workers/serving/heartbeat.py": "the peak of memory where there is no /proc",
    "workers/penstock_workers/settings.py": "names of kinds of CPUs; none of them has to be there",
}
"""Files that use some of it, and what they do where it is not there."""


def test_what_is_tied_to_a_system_or_processor_has_a_fallback() -> None:
    """A file that is new here gets one, and a line that says which."""
    found = {
        str(path): sorted(set(TIED.findall((ROOT / path).read_text())))
        for path in structure.modules(".py")
        if TIED.search((ROOT / path).read_text())
    }

    assert {path: words for path, words in found.items() if path not in FALLBACKS} == {}
    assert FALLBACKS.keys() - found.keys() == set()
