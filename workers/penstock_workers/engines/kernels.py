"""What lies between an encoder's matrix products, in C: attention of texts end to end, sums and norms.

Torch does the same in many small steps, which copy, pad and round between each two: a third of the time of a
batch, a tenth this way. The source is compiled where the package is built or installed (`hatch_build.py`).
Where there was no C compiler, without AVX-512 BF16, or with several threads, torch computes.
"""

import ctypes
import hashlib
import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from penstock_workers.engines.device import processor_flags

logger = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).with_suffix(".c")
LANES: Final = 16
_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Kernels:
    """The compiled functions.

    Attributes:
        version: another source has another.

    Args:
        path: what `kernels.c` became.

    Raises:
        OSError: it is not there, or not for this machine.
    """

    def __init__(self, path: Path) -> None:
        library, self.version = ctypes.CDLL(str(path)), path.stem
        self._attend, self._add_norm = library.attend, library.add_norm
        self._embed_norm = library.embed_norm
        heads = 3 * (_POINTER, _INT64, _INT64)
        sizes = (_FLOAT, _INT64, _INT64, _POINTER, _POINTER)
        masks = (_FLOAT, _INT64, _INT, _POINTER, _POINTER)
        self._attend.argtypes = (_INT64, *heads, _POINTER, *3 * (_INT64,), *masks)
        self._add_norm.argtypes = (*4 * (_POINTER,), *sizes)
        self._embed_norm.argtypes = (*6 * (_POINTER,), *3 * (_INT64,), *2 * (_POINTER,), *sizes)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends: Tensor,
        *,
        longest: int,
        scale: float,
        window: int | None = None,
        is_causal: bool = False,
    ) -> Tensor | None:
        """Attention in which each text of a row sees itself alone.

        Args:
            query: bfloat16, shape (n_tokens, n_heads, dim).
            key: as `query`, perhaps with fewer heads.
            value: as `key`.
            ends: where texts begin and end; int32, shape (n_texts + 1,).
            longest: tokens of the longest text.
            scale: of the scores.
            window: tokens from a query to the nearest one that it does not see; None for all.
            is_causal: nothing sees what comes after it.

        Returns:
            bfloat16, shape (n_tokens, n_heads, dim); None where there is no code for heads of this size.
        """
        n_tokens, n_heads, dim = query.shape
        parts = [part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value)]
        out = torch.empty(n_tokens, n_heads, dim, dtype=torch.bfloat16)
        space = torch.empty((4 * dim + 32) * (longest + LANES), dtype=torch.uint8)
        heads = (number for part in parts for number in (part.data_ptr(), part.stride(0), part.stride(1)))
        is_computed = self._attend(
            dim,
            *heads,
            ends.data_ptr(),
            len(ends) - 1,
            n_heads,
            n_heads // key.shape[1],
            scale * math.log2(math.e),
            window or 0,
            is_causal,
            out.data_ptr(),
            space.data_ptr(),
        )
        return out if is_computed else None

    def add_norm(self, states: Tensor, residual: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Return a LayerNorm of a sum, in float32 and rounded to bfloat16.

        Args:
            states: bfloat16, contiguous, shape (n_tokens, dim), `dim` a multiple of 16.
            residual: float32, contiguous, same shape.
            norm: float32, with weight and bias.
        """
        out, rounded = torch.empty_like(residual), torch.empty_like(states)
        self._add_norm(
            states.data_ptr(),
            residual.data_ptr(),
            norm.weight.data_ptr(),
            norm.bias.data_ptr(),
            norm.eps,
            *states.shape,
            out.data_ptr(),
            rounded.data_ptr(),
        )
        return out, rounded

    def embed_norm(
        self, indices: Sequence[Tensor], tables: Sequence[Tensor], norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """Return a LayerNorm of the sum of three embeddings, in float32 and rounded to bfloat16.

        Args:
            indices: into each table, int64, contiguous, shape (n_tokens,).
            tables: float32, contiguous, each of shape (n_entries, dim), `dim` a multiple of 16.
            norm: float32, with weight and bias.

        Raises:
            IndexError: an index is not within its table.
        """
        n_tokens, dim = len(indices[0]), tables[0].shape[1]
        out, rounded = torch.empty(n_tokens, dim), torch.empty(n_tokens, dim, dtype=torch.bfloat16)
        is_within = self._embed_norm(
            *(index.data_ptr() for index in indices),
            *(table.data_ptr() for table in tables),
            *map(len, tables),
            norm.weight.data_ptr(),
            norm.bias.data_ptr(),
            norm.eps,
            n_tokens,
            dim,
            out.data_ptr(),
            rounded.data_ptr(),
        )
        if not is_within:
            raise IndexError("a token, position or type is not in its table")
        return out, rounded


def find_kernels(device: torch.device) -> Kernels | None:
    """Return what this machine can use; None where torch computes."""
    # They have one thread, as a process that embeds has by default: torch would share the work out.
    return _load() if device.type == "cpu" and torch.get_num_threads() == 1 else None


@cache
def _load() -> Kernels | None:
    if not {"avx512bw", "avx512vl", "avx512_bf16"} <= processor_flags():
        return None
    try:
        return Kernels(compiled_path())
    except OSError as error:
        logger.warning(
            "torch computes what C would faster: install penstock where there is a C compiler: %s", error
        )
        return None


def compiled_path() -> Path:
    """Return where the shared library lies, if it was compiled from this source."""
    return SOURCE.with_name(f"kernels-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so")
