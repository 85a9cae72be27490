"""The functions of `kernels.c`: structs, prototypes, and the memory and order of weights that they want.

They compute in bfloat16: attention over a row of texts for every model, and the whole encoder of the BERT
family. Torch does what lies between products in many small steps, which copy, pad and round each time.
`hatch_build.py` compiles the source where a wheel is built, or the package installed from source. Torch
computes where there was no C compiler, on CPUs without AVX-512 BF16, and in processes of several threads.
"""

import ctypes
import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from penstock_workers.embedding.c_library import compiled_path, is_for_this_cpu, tell_missing

logger = logging.getLogger(__name__)

HEAD_SIZES: Final = (16, 32, 48, 64, 80, 96, 128)
LANES: Final = 16
"""Numbers of float32 in a vector register: all widths of a model are multiples."""
PANEL: Final = 64
"""Outputs of a Linear layer that are computed at once, so their weights lie together."""
_BLOCK: Final = 192
"""Tokens that go through a layer at once, `BLOCK` in the source."""
_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class CLinear(ctypes.Structure):
    """A Linear layer, `Linear` in the source; its weights and biases come from `lay_out`."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("n_in", _INT64), ("n_out", _INT64))


class CNorm(ctypes.Structure):
    """A LayerNorm, `Norm` in the source."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("eps", _FLOAT))


class CLayer(ctypes.Structure):
    """One layer of an encoder, `Layer` in the source."""

    _fields_ = (
        ("heads", CLinear),
        ("output", CLinear),
        ("up", CLinear),
        ("down", CLinear),
        ("output_norm", CNorm),
        ("down_norm", CNorm),
    )


class CEncoder(ctypes.Structure):
    """An encoder, `Encoder` in the source. It holds addresses: whoever makes one keeps the tensors."""

    _fields_ = (
        ("tables", 3 * _POINTER),
        ("n_entries", 3 * _INT64),
        ("norm", CNorm),
        ("layers", ctypes.POINTER(CLayer)),
        ("n_layers", _INT64),
        ("n_heads", _INT64),
        ("dim", _INT64),
    )


class Kernels:
    """The compiled functions.

    Attributes:
        version: Name of the library's file, which differs for each source.

    Args:
        path: The shared library that was made from `kernels.c`.

    Raises:
        OSError: The library is not there, or not for this machine.
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
        """Compute attention in which each text of a row sees itself alone.

        Args:
            query: bfloat16, shape (n_tokens, n_heads, dim).
            key: Like `query`, perhaps with fewer heads.
            value: Like `key`.
            ends: Where texts begin and end; int32, shape (n_texts + 1,).
            longest: Tokens of the longest text.
            scale: Factor for the scores, positive.
            window: Tokens from a query to the nearest key that it does not see; None: it sees all.
            is_causal: Let no query see a later key.

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
        encoder: CEncoder,
        words: Tensor,
        positions: Tensor,
        types: Tensor,
        ends: Tensor,
        *,
        longest: int,
    ) -> Tensor:
        """Return a BERT's last hidden states.

        Args:
            encoder: The model; each head has one of `HEAD_SIZES`.
            words: Row of each token in the table of words; int64, contiguous, shape (n_tokens,).
            positions: The same in the table of positions.
            types: The same in the table of types.
            ends: Where texts begin and end; int32, shape (n_texts + 1,).
            longest: Tokens of the longest text.

        Returns:
            float32, shape (n_tokens, dim).

        Raises:
            IndexError: A word, position or type is not in its table.
        """
        n_tokens, dim = len(words), encoder.dim
        size = dim // encoder.n_heads
        hidden = torch.empty(n_tokens, dim)
        space = torch.empty(_encoder_bytes(encoder, n_tokens, longest), dtype=torch.uint8)
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


def c_norm(norm: nn.LayerNorm) -> CNorm:
    """Return a norm as the functions read it."""
    return CNorm(norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps)


def n_outputs(linears: Sequence[nn.Linear]) -> int:
    """Return how many numbers Linear layers with the same input give together."""
    return sum(linear.out_features for linear in linears)


def lay_out(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Return the weights and biases of Linear layers with the same input, as of one layer.

    Returns:
        Weights, bfloat16, shape (n_panels, n_in / 2, PANEL, 2); biases, float32, shape (n_panels * PANEL,).
        Zeros fill the last panel.

    Raises:
        NotImplementedError: A width is no multiple of `LANES`.
    """
    n_in, n_out = linears[0].in_features, n_outputs(linears)
    if n_in % LANES or n_out % LANES:
        raise NotImplementedError("its widths are unusual")
    weight = torch.cat([linear.weight.detach() for linear in linears]).bfloat16()
    weight = nn.functional.pad(weight, (0, 0, 0, -n_out % PANEL))
    weight = weight.view(-1, PANEL, n_in // 2, 2).transpose(1, 2).contiguous()
    bias = torch.cat([linear.bias.detach() for linear in linears])
    return weight, nn.functional.pad(bias, (0, -n_out % PANEL))


def _attention_bytes(dim: int, longest: int) -> int:
    """Return the memory that `attend` wants for what it computes in between."""
    return (2 * dim + 64) * (longest + 1)


def _encoder_bytes(encoder: CEncoder, n_tokens: int, longest: int) -> int:
    """Return the memory that `encode` wants for what it computes in between."""
    inner = 2 * _BLOCK * encoder.layers[0].up.n_out
    size = encoder.dim // encoder.n_heads
    return int(8 * n_tokens * encoder.dim + inner + 64 + _attention_bytes(size, longest))


def find_kernels(device: torch.device) -> Kernels | None:
    """Return the functions, if this machine can use them; None where torch computes."""
    # They use one thread, as a process that embeds has by default; torch would use all of several.
    return _load() if device.type == "cpu" and torch.get_num_threads() == 1 else None


@cache
def _load() -> Kernels | None:
    if not is_for_this_cpu():
        return None
    try:
        return Kernels(compiled_path())
    except OSError as error:
        logger.warning("%s", tell_missing(error))
        return None
