"""Are texts embedded faster through the queue than by a loop around `encode`?

1,024 texts of mixed length (docstrings of the standard library, shuffled) go through client, Redis and two
worker processes of one thread; the peers run in this process, on all cores, while the workers are idle.
Ways take turns; medians are compared. Peers whose vectors differ from float32 `encode` (cosine below
0.9999) are shown and not compared.

Run: python -m benchmarks.embedding [--quick] [--json FILE] [--plot FILE]
"""

import inspect
import os
import pkgutil
import statistics
import time
from collections.abc import Callable
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from benchmarks.deployment import deployed
from benchmarks.report import Figure, Report, Row, arguments, finish
from penstock import Client
from penstock_workers.bundled import bundled_folder

MODELS = '[models.minilm]\ntask = "embed"\nsource = "bundled:minilm"\n'
MODULES = ("collections", "email", "http", "importlib", "json", "logging", "unittest", "wsgiref")
MIN_COSINE = 0.9999
SHORT_TEXT = "How far is the turbine from the gate?"


def main() -> None:
    options = arguments(__doc__)
    n_texts, n_rounds, n_single = (256, 3, 40) if options.quick else (1024, 7, 200)
    texts = docstrings(n_texts)
    torch.set_num_threads(os.cpu_count() or 1)
    fp32, bf16 = load(torch.float32), load(torch.bfloat16)
    with deployed(MODELS, processes=os.cpu_count() or 1) as client:
        ways: dict[str, Callable[[], NDArray[np.float32]]] = {
            "penstock": lambda: np.concatenate(list(client.embed_many(texts, model="minilm"))),
            "sentence-transformers fp32": lambda: fp32.encode(texts, batch_size=32),
            "sentence-transformers bf16": lambda: encode_bf16(bf16, texts),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        vectors: dict[str, NDArray[np.float32]] = {}
        for _ in range(n_rounds + 1):  # the first is a warm-up
            for name, way in ways.items():
                began = time.perf_counter()
                vectors[name] = way()
                seconds[name].append(time.perf_counter() - began)
        rows = [
            Row(way=n, unit="texts/s", values=[len(texts) / s for s in v[1:]]) for n, v in seconds.items()
        ]
        single = single_texts(client, fp32, n_single)
    reference = vectors["sentence-transformers fp32"]
    worst = {name: float(cosines(found, reference).min()) for name, found in vectors.items()}
    rows += [Row(way=f"{name}, smallest cosine", unit="", values=[c]) for name, c in worst.items()]
    speed = {row.way: row.median for row in rows if row.unit == "texts/s"}
    peers = {name: v for name, v in speed.items() if name != "penstock" and worst[name] >= MIN_COSINE}
    overhead = 1e3 * (statistics.median(single["penstock"]) - statistics.median(single["encode"]))
    figures = {
        "vs_fastest_peer": Figure(value=speed["penstock"] / max(peers.values()), unit="x", goal=1.3),
        "vs_sentence_transformers_fp32": Figure(
            value=speed["penstock"] / speed["sentence-transformers fp32"], unit="x", goal=1.0
        ),
        "min_cosine": Figure(value=worst["penstock"], unit="", goal=MIN_COSINE),
        "single_text_overhead_ms_p50": Figure(value=overhead, unit="ms", goal=4.0, at_most=True),
    }
    rows += [
        Row(way=f"one short text, {n}", unit="ms", values=[1e3 * s for s in v]) for n, v in single.items()
    ]
    finish(Report(name="embedding", rows=rows, figures=figures), options)


def load(dtype: torch.dtype) -> SentenceTransformer:
    """Load the model as people do."""
    return SentenceTransformer(str(bundled_folder("minilm")), device="cpu", model_kwargs={"dtype": dtype})


def docstrings(n_texts: int) -> list[str]:
    """Return docstrings of the standard library, in a fixed random order."""
    found: dict[str, None] = {}
    for name in MODULES:
        package = import_module(name)
        names = [name, *(f"{name}.{module.name}" for module in pkgutil.iter_modules(package.__path__))]
        for module in map(import_module, (n for n in names if not n.endswith("__main__"))):
            for _, thing in sorted(inspect.getmembers(module), key=lambda member: member[0]):
                members = inspect.getmembers(thing) if inspect.isclass(thing) else []
                for one in [thing, *(member for _, member in members)]:
                    text = inspect.getdoc(one) if callable(one) else None
                    if text and len(text) > 20:
                        found[text] = None
    texts = list(found)
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order[:n_texts]]


def encode_bf16(model: SentenceTransformer, texts: list[str]) -> NDArray[np.float32]:
    """`encode` of a bfloat16 model; numpy has no such type, so it goes through a tensor."""
    vectors: NDArray[np.float32] = model.encode(texts, batch_size=32, convert_to_tensor=True).float().numpy()
    return vectors


def single_texts(client: Client, model: SentenceTransformer, n_times: int) -> dict[str, list[float]]:
    """Time one short text on an idle system, both ways in turn; seconds."""
    found: dict[str, list[float]] = {"penstock": [], "encode": []}
    for _ in range(n_times):
        began = time.perf_counter()
        client.embed([SHORT_TEXT], model="minilm")
        found["penstock"].append(time.perf_counter() - began)
        began = time.perf_counter()
        model.encode([SHORT_TEXT])
        found["encode"].append(time.perf_counter() - began)
    return found


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of each row of `a` with the row of `b`, shape (n,)."""
    found: NDArray[np.float32] = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found


if __name__ == "__main__":
    main()
