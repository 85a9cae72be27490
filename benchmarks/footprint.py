"""What does the client cost a service, and what does a worker process hold?

Import time and modules of `import penstock` in fresh interpreters, beside Celery's app and redis-py's client;
resident memory of worker processes that serve one model, the other, and both, beside a process that has
imported what engines need and loaded nothing; and what one and four processes hold together with each shared
page counted once (PSS).

Run: python -m benchmarks.footprint [--quick] [--json FILE] [--plot FILE]
"""

import subprocess
import sys
import time

from benchmarks.deployment import deployed
from benchmarks.report import Figure, Report, Row, arguments, finish
from penstock.registry import HEARTBEAT_S
from penstock_workers.hardware.machine import pss_bytes

EMBED = '[models.minilm]\ntask = "embed"\nsource = "bundled:minilm"\n'
CHAT = '[models.chat]\ntask = "generate"\nsource = "bundled:tiny-chat"\n'
TIMED_IMPORT = """
import sys, time
began = time.perf_counter()
import {module}
print(time.perf_counter() - began, len(sys.modules))
"""
BARE = """
import sentence_transformers, celery, resource
pages = int(open("/proc/self/statm").read().split()[1])
print(pages * resource.getpagesize())
"""
HEAVY = ("torch", "transformers", "sentence_transformers", "celery", "kombu")


def main() -> None:
    options = arguments(__doc__)
    n_imports = 3 if options.quick else 15
    modules = ("penstock", "celery.app.base", "redis.asyncio")
    times: dict[str, list[float]] = {module: [] for module in modules}
    counts: dict[str, float] = {}
    for _ in range(n_imports + 1):
        for module in modules:
            seconds, n_modules = run(TIMED_IMPORT.format(module=module)).split()
            times[module].append(float(seconds))
            counts[module] = float(n_modules)
    rows = [Row(way=f"import {name}", unit="s", values=values[1:]) for name, values in times.items()]
    rows += [Row(way=f"modules after import {name}", unit="", values=[n]) for name, n in counts.items()]
    memory = {"engines' libraries, no model": float(run(BARE)) / 2**20}
    for way, models in (("minilm", EMBED), ("chat", CHAT), ("minilm and chat", EMBED + CHAT)):
        memory[f"worker with {way}"] = worker_mebibytes(models)
    rows += [Row(way=way, unit="MiB", values=[value]) for way, value in memory.items()]
    alone, four = worker_pss_mebibytes(1), worker_pss_mebibytes(4)
    rows += [
        Row(way="PSS of one worker with minilm", unit="MiB", values=alone),
        Row(way="PSS of each of four workers with minilm", unit="MiB", values=four),
    ]
    pulled = run(f"import sys, penstock; print(len([m for m in {HEAVY!r} if m in sys.modules]))")
    figures = {
        "client_import_s": Figure(value=rows[0].median, unit="s", goal=1.0, at_most=True),
        "client_heavy_modules": Figure(value=float(pulled), unit="", goal=0.0, at_most=True),
        "second_model_mib": Figure(
            value=memory["worker with minilm and chat"] - memory["worker with minilm"], unit="MiB"
        ),
        "four_workers_pss_mib": Figure(value=sum(four), unit="MiB"),
        "per_process_pss_mib": Figure(value=sum(four) / len(four), unit="MiB"),
    }
    finish(Report(name="footprint", rows=rows, figures=figures), options)


def run(program: str) -> str:
    """Return what a program prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout


def worker_mebibytes(models: str) -> float:
    """Return the resident memory of a worker process after its first jobs."""
    with deployed(models, processes=1) as client:
        if "minilm" in models:
            client.embed(["a text of a few words"] * 64, model="minilm")
        if "chat" in models:
            client.generate("What is 17 + 26?", model="chat")
        time.sleep(2 * HEARTBEAT_S)  # the registry has what the last heartbeat saw
        return client.registry().workers[0][0].memory_bytes / 2**20


def worker_pss_mebibytes(processes: int) -> list[float]:
    """Return the proportional memory of each worker process that serves minilm, after jobs for all."""
    with deployed(EMBED, processes=processes) as client:
        texts = ["a text of a few words"] * 64
        jobs = client.submit_many([texts] * 16 * processes, model="minilm")
        for job in jobs:
            job.result(timeout_s=60)
        found = [pss_bytes(worker.pid) for worker, _ in client.registry().workers]
    if None in found:
        raise SystemExit("PSS is told by Linux alone")
    return [n_bytes / 2**20 for n_bytes in found if n_bytes is not None]


if __name__ == "__main__":
    main()
