"""How much does a worker grow that is asked for everything, and fails a third of it?

One worker process serves `bundled:minilm` and `bundled:tiny-chat`. A round holds one request of each kind:
texts, answers, streams, formats and completions that succeed, and requests that are refused, cut, cancelled
or late. Memory is the process's resident set (VmRSS) after the first rounds, in which allocators and caches
find their size, and at the end.

Run: python -m benchmarks.growth [--quick] [--json FILE] [--plot FILE]
`--quick` sends 600 requests, the whole run 10,000.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.deployment import deployed
from benchmarks.report import Figure, Report, Row, arguments, finish
from penstock import Client
from penstock.errors import PenstockError

MODELS: Final = (
    '[models.minilm]\ntask = "embed"\nsource = "bundled:minilm"\nengine = "torch"\n'
    '[models.chat]\ntask = "generate"\nsource = "bundled:tiny-chat"\n'
)
N_REQUESTS, N_QUICK = 10_000, 600
WARM_SHARE: Final = 0.1
"""Of the requests, those that come before memory is first read."""
N_POINTS: Final = 50
GOAL_MIB: Final = 50.0

Ask = Callable[[Client], object]


def chat(**options: Any) -> Ask:
    """Return a request for an answer."""
    fields: dict[str, Any] = {"prompt": "Hello", "max_new_tokens": 8} | options
    return lambda client: client.generate(model="chat", **fields)


def answer_in(pattern: str, **options: Any) -> Ask:
    """Return a request for an answer that a pattern matches."""
    return chat(response_format={"type": "regex", "pattern": pattern}, **options)


def cancel(client: Client) -> None:
    """Send a job and take it back."""
    client.submit_generate("Hello", model="chat", max_new_tokens=200).cancel()


FINE: Final[Sequence[Ask]] = (
    lambda client: client.embed(["one", "two, a little longer"], model="minilm"),
    lambda client: client.embed(["water " * 100], model="minilm", precision="int8"),
    lambda client: list(client.stream("Hello", model="chat", max_new_tokens=8)),
    chat(),
    chat(temperature=1.0, n=3),
    chat(mode="complete", stop=["."]),
    chat(logprobs=True, top_logprobs=2),
    answer_in("[a-z]{5}"),
    chat(response_format={"type": "choice", "choices": ["yes", "no"]}),
    chat(
        response_format={"type": "json_schema", "json_schema": {"schema": {"type": "integer", "maximum": 9}}}
    ),
)
FAILING: Final[Sequence[Ask]] = (
    answer_in("("),
    answer_in("[a-z]{100}", max_new_tokens=3),
    chat(prompt="word " * 3000),
    cancel,
    chat(deadline_s=0.001),
)


def resident_mib(pid: int) -> float:
    """Return what a process holds in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def worker_pid(client: Client) -> int:
    """Return the one worker's process."""
    ((worker, _),) = client.registry().workers
    return worker.pid


def measure(client: Client, pid: int, n_requests: int) -> tuple[list[float], list[float], int]:
    """Send requests in turn; return memory at some of them, when that was, and how many failed."""
    asked = [*FINE, *FAILING]
    sizes, times, n_failed, began = [], [], 0, time.monotonic()
    n_warm = int(n_requests * WARM_SHARE)
    for n in range(n_warm + n_requests):
        with contextlib.suppress(PenstockError):
            asked[n % len(asked)](client)
            n_failed -= 1
        n_failed += 1
        if n >= n_warm and (n - n_warm) % (n_requests // N_POINTS) == 0:
            sizes.append(resident_mib(pid))
            times.append(time.monotonic() - began)
    return [*sizes, resident_mib(pid)], [*times, time.monotonic() - began], n_failed


def main() -> None:
    """Run it."""
    options = arguments(__doc__)
    n_requests = N_QUICK if options.quick else N_REQUESTS
    with deployed(MODELS, processes=1) as client:
        sizes, times, n_failed = measure(client, worker_pid(client), n_requests)
    row = Row(way="worker, memory", unit="MiB", values=sizes, at=times)
    figures = {
        "growth_mib": Figure(value=sizes[-1] - sizes[0], unit="MiB", goal=GOAL_MIB, at_most=True),
        "requests": Figure(value=n_requests, unit=""),
        "failed": Figure(value=n_failed, unit=""),
    }
    finish(Report(name="growth", rows=[row], figures=figures), options)


if __name__ == "__main__":
    main()
