"""How people put a model behind Celery today: stock parts, a task for each text, a list of numbers back.

Worker processes fork, as Celery does by default, and each loads the model once. They read the places of
Redis and the model from variables; nothing happens on import without them.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from celery import Celery
from celery.signals import worker_process_init

from penstock_workers.command.local_redis import free_port, local_redis_command, wait_until_ready

URL: Final = "NAIVE_URL"
MODEL: Final = "NAIVE_MODEL"
START_LIMIT_S: Final = 120

app = Celery("naive", broker=os.environ.get(URL), backend=os.environ.get(URL))
app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)
_loaded: list[Any] = []
_running: list[subprocess.Popen[bytes]] = []


@worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]  # Celery has no types
def load(**_: object) -> None:
    """Load the model into a worker process; one thread, the layout that is fastest for the peer too."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    _loaded.append(SentenceTransformer(os.environ[MODEL], device="cpu"))


@app.task(name="naive.embed")  # type: ignore[untyped-decorator]  # Celery has no types
def embed(text: str) -> list[float]:
    """Embed one text."""
    vector: list[float] = _loaded[0].encode(text).tolist()
    return vector


def deployed(model: Path, *, processes: int) -> Any:
    """Start Redis and workers that live as long as this process; return the task, ready to be sent.

    Raises:
        RuntimeError: something has put other parts in the place of Celery's own.
    """
    from kombu.transport import TRANSPORT_ALIASES

    if not TRANSPORT_ALIASES["redis"].startswith("kombu."):
        raise RuntimeError("this process has replaced Celery's own Redis transport")
    url = f"redis://127.0.0.1:{(port := free_port())}/0"
    os.environ.update({URL: url, MODEL: str(model), "OMP_NUM_THREADS": "1"})
    _until_we_end(local_redis_command(port=port, folder=None))
    wait_until_ready(url, within_s=10)
    _until_we_end(
        [sys.executable, "-m", "celery", "-A", "benchmarks.naive_app", "worker", "-c", str(processes)]
    )
    app.conf.update(broker_url=url, result_backend=url)
    for result in [embed.delay("a text") for _ in range(4 * processes)]:
        result.get(timeout=START_LIMIT_S)
    return embed


def _until_we_end(command: list[str]) -> None:
    # The shell sees this process end by the end of its input, and ends the command.
    _running.append(
        subprocess.Popen(
            ["sh", "-c", '"$@" & cat > /dev/null; kill $!; wait', "sh", *command],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
        )
    )
