"""An encoder in bfloat16 in C: attention of texts end to end for every model, all of the BERT family's.

Torch does what lies between products in many small steps, which copy, pad and round between each two. The
source is compiled where the package is built or installed (`hatch_build.py`). Where there was no C compiler,
without AVX-512 BF16, or with several threads, torch computes.
"""

import ctypes
import hashlib
import logging
import math
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from penstock_workers.hardware.machine import cpu_flags

logger = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).with_name("kernels.c")
HEAD_SIZES: Final = (16, 32, 48, 64, 80, 96, 128)
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
        self._attend, self._encode = library.attend, library.encode
        heads = 3 * (_POINTER, _INT64, _INT64)
        masks = (_FLOAT, _INT64, _INT, _POINTER, _POINTER)
        self._attend.argtypes = (_INT64, *heads, _POINTER, *3 * (_INT64,), *masks)
        self._attend.restype = None
        self._encode.argtypes = (*5 * (_POINTER,), _INT64, _FLOAT, *2 * (_POINTER,))

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
            scale: of the scores, positive.
            window: tokens from a query to the nearest one that it does not see; None for all.
            is_causal: nothing sees what comes after it.

        Returns:
            bfloat16, shape (n_tokens, n_heads, dim); None where there is no code for heads of this size.
        """
        n_tokens, n_heads, dim = query.shape
        if dim not in HEAD_SIZES:
            return None
        parts = [part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value)]
        out = torch.empty(n_tokens, n_heads, dim, dtype=torch.bfloat16)
        space = torch.empty(_attention_bytes(dim, longest), dtype=torch.uint8)
        heads = (number for part in parts for number in (part.data_ptr(), part.stride(0), part.stride(1)))
        self._attend(
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
        return out

    def encode(
        self,
        encoder: ctypes.Structure,
        words: Tensor,
        positions: Tensor,
        types: Tensor,
        ends: Tensor,
        *,
        longest: int,
    ) -> Tensor:
        """Return a BERT's last hidden states.

        Args:
            encoder: the model, see `bert_c.py`; each head has one of HEAD_SIZES.
            words: of each token, int64, contiguous, shape (n_tokens,).
            positions: as `words`.
            types: as `words`.
            ends: where texts begin and end; int32, shape (n_texts + 1,).
            longest: tokens of the longest text.

        Returns:
            float32, shape (n_tokens, dim).

        Raises:
            IndexError: a word, position or type is not in its table.
        """
        n_tokens, dim = len(words), encoder.dim
        size = dim // encoder.n_heads
        hidden = torch.empty(n_tokens, dim)
        n_bytes = 8 * n_tokens * dim + 384 * encoder.layers[0].up.n_out + 64 + _attention_bytes(size, longest)
        space = torch.empty(n_bytes, dtype=torch.uint8)
        is_within = self._encode(
            ctypes.byref(encoder),
            *(indices.data_ptr() for indices in (words, positions, types, ends)),
            len(ends) - 1,
            size**-0.5 * math.log2(math.e),
            hidden.data_ptr(),
            space.data_ptr(),
        )
        if not is_within:
            raise IndexError("a token, position or type is not in its table")
        return hidden


def _attention_bytes(dim: int, longest: int) -> int:
    return (2 * dim + 64) * (longest + 1)


def find_kernels(device: torch.device) -> Kernels | None:
    """Return what this machine can use; None where torch computes."""
    # They have one thread, as a process that embeds has by default: torch would share the work out.
    return _load() if device.type == "cpu" and torch.get_num_threads() == 1 else None


@cache
def _load() -> Kernels | None:
    if not {"avx512bw", "avx512vl", "avx512_bf16"} <= cpu_flags():
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
