"""How fast could this machine embed at best: its own matrix-product rate, and what a text costs.

The rate is measured by one process of one thread on each core, all at once, as Penstock's workers run.
"""

import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from statistics import fmean
from typing import Any, Final, Self

WINDOW_S: Final = 0.15
"""How long each shape of product is repeated."""

_together: list[Barrier] = []


def flop_per_text(config: Mapping[str, Any], lengths: Iterable[int]) -> float:
    r"""Return the floating-point operations of the transformer's matrix products, mean over texts.

    A text of n tokens costs `layers * (8 n d^2 + 4 n^2 d + 4 n d f)`: four projections of d by d, scores
    and their sum over the values, two products of d by f; a multiplication and an addition count as two.
    Padding, embeddings, norms, softmax, GELU and pooling count nothing.

    Args:
        config: of a BERT; `hidden_size` is d, `intermediate_size` f.
        lengths: tokens of each text after truncation, special ones counted.

    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1, per token; there scores see half of the text,
    here, without a causal mask, all of it, and the sum over the values is counted too.
    """
    layers, d, f = (config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    return fmean(layers * (8 * n * d * d + 4 * n * n * d + 4 * n * d * f) for n in lengths)


class Machine:
    """Processes that measure matrix products; they sleep in between.

    Args:
        config: of the model.
        device: "cpu" for all cores, or "cuda" for one GPU.
    """

    def __init__(self, config: Mapping[str, Any], device: str = "cpu") -> None:
        self._d, self._f, self._device = int(config["hidden_size"]), int(config["intermediate_size"]), device
        self._n = (os.cpu_count() or 1) if device == "cpu" else 1
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            self._n, mp_context=context, initializer=_start, initargs=(context.Barrier(self._n),)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def flop_per_s(self) -> float:
        """Return the rate of all cores together, or of the GPU: the best of two formats and five shapes."""
        n, large = (1024, 2048) if self._device == "cpu" else (16_384, 8192)
        shapes = [(n, self._d, 3 * self._d), (n, self._d, self._f), (n, self._f, self._d)]
        shapes += [(large // 2,) * 3, (large,) * 3]
        best = 0.0
        for dtype in ("bfloat16", "float32"):
            for shape in shapes:
                found = self._pool.map(_rate, [dtype] * self._n, [shape] * self._n, [self._device] * self._n)
                best = max(best, sum(found))
        return best


def _start(together: Barrier) -> None:
    import torch

    torch.set_num_threads(1)
    _together.append(together)


def _rate(dtype: str, shape: tuple[int, int, int], device: str) -> float:
    import torch

    n, k, m = shape
    a = torch.randn(n, k, device=device).to(getattr(torch, dtype))
    weight = torch.randn(m, k, device=device).to(getattr(torch, dtype))
    with torch.inference_mode():
        torch.nn.functional.linear(a, weight)
        _together[0].wait()
        n_done, began = 0, time.perf_counter()
        while (seconds := time.perf_counter() - began) < WINDOW_S:
            for _ in range(1 if device == "cpu" else 10):  # a GPU is given work ahead
                torch.nn.functional.linear(a, weight)
                n_done += 1
            if device != "cpu":
                torch.cuda.synchronize()
    return 2.0 * n * k * m * n_done / seconds
