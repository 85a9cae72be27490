"""The functions of `kernels_encoder.h`: structs, prototypes, and the order of weights that they want.

They compute attention over a row of texts for every model, and the whole encoder of the BERT family. Torch
does what lies between products in many small steps, which copy and pad each time. `hatch_build.py` compiles
one variant for each kind of CPU, all into one library, where a wheel is built, or the package installed from
source. Torch computes where there was no C compiler, on CPUs without AVX2, and in processes of several
threads.
"""

import ctypes
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from penstock_workers.embedding.c_library import NEEDED, compiled_path, is_for_this_cpu, tell_missing
from penstock_workers.hardware.machine import cpu_limit

logger = logging.getLogger(__name__)

HEAD_SIZES: Final = (16, 32, 48, 64, 80, 96, 128)
OUTPUTS: Final = 16
"""All widths of a model are multiples."""
_AVX512_BF16: Final = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"})
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The functions as they are compiled for one kind of CPU.

    Attributes:
        name: Prefix of its functions' names.
        dtype: Format of the factors of products; sums are float32.
        needs: Instruction sets, in Linux's words.
    """

    name: str
    dtype: torch.dtype
    needs: frozenset[str]


VARIANTS: Final = (
    Variant(name="amx", dtype=torch.bfloat16, needs=_AVX512_BF16 | {"amx_tile", "amx_bf16"}),
    Variant(name="avx512_bf16", dtype=torch.bfloat16, needs=_AVX512_BF16),
    Variant(name="avx512", dtype=torch.float32, needs=frozenset({"avx512f", "fma"})),
    Variant(name="avx2", dtype=torch.float32, needs=NEEDED),
)
"""The faster one of a dtype comes first."""


class Kernels:
    """The compiled functions of one variant.

    Attributes:
        variant: The variant.
        version: Names of the library's file, which differs for each source, and of the variant.
        panel: Outputs of a Linear layer whose weights lie together.

    Args:
        path: The shared library that was made from the sources.
        variant: One that the CPU can run.

    Raises:
        OSError: The library is not there, or not for this machine, or the system does not allow the variant.
    """

    def __init__(self, path: Path, variant: Variant) -> None:
        library, self.variant, self.version = ctypes.CDLL(str(path)), variant, f"{path.stem} {variant.name}"
        try:
            self._attend, self._encode, self._attention_bytes, self._encoder_bytes, is_allowed = (
                getattr(library, f"{variant.name}_{name}")
                for name in ("attend", "encode", "attention_bytes", "encoder_bytes", "is_allowed")
            )
        except AttributeError as error:
            raise OSError(f"the C compiler did not know {variant.name}") from error
        if not is_allowed():
            raise OSError(f"the system does not allow {variant.name}")
        self.panel, self._inputs = (
            int(_INT64.in_dll(library, f"{variant.name}_{name}").value) for name in ("panel", "inputs")
        )
        heads = 3 * (_POINTER, _INT64, _INT64)
        masks = (_FLOAT, _INT64, _INT, _POINTER, _POINTER)
        self._attend.argtypes = (_INT64, *heads, _POINTER, *3 * (_INT64,), *masks)
        self._attend.restype = None
        self._encode.argtypes = (*5 * (_POINTER,), _INT64, _FLOAT, *2 * (_POINTER,))
        self._attention_bytes.argtypes, self._attention_bytes.restype = 2 * (_INT64,), _INT64
        self._encoder_bytes.argtypes = (_POINTER, _INT64, _INT64)
        self._encoder_bytes.restype = _INT64

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
            query: The variant's dtype, shape (n_tokens, n_heads, dim).
            key: Like `query`, perhaps with fewer heads.
            value: Like `key`.
            ends: Where texts begin and end; int32, shape (n_texts + 1,).
            longest: Tokens of the longest text.
            scale: Factor for the scores, positive.
            window: Tokens from a query to the nearest key that it does not see; None: it sees all.
            is_causal: Let no query see a later key.

        Returns:
            The variant's dtype, shape (n_tokens, n_heads, dim); None where there is no code for heads of this
            size.
        """
        n_tokens, n_heads, dim = query.shape
        if dim not in HEAD_SIZES:
            return None
        parts = [part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value)]
        out = torch.empty(n_tokens, n_heads, dim, dtype=self.variant.dtype)
        space = torch.empty(self._attention_bytes(dim, longest), dtype=torch.uint8)
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
            encoder: The model, laid out for this variant; each head has one of `HEAD_SIZES`.
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
        n_bytes = self._encoder_bytes(ctypes.byref(encoder), n_tokens, longest)
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

    def lay_out(self, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
        """Return the weights and biases of Linear layers with the same input, as of one layer.

        Returns:
            Weights, float32, shape (n_panels, n_in, panel); or bfloat16, shape (n_panels, n_in / 2, panel,
            2). Biases, float32, shape (n_panels * panel,). Zeros fill the last panel.

        Raises:
            NotImplementedError: A width is no multiple of what products take at once.
        """
        n_in, n_out = linears[0].in_features, n_outputs(linears)
        if n_in % self._inputs or n_out % OUTPUTS:
            raise NotImplementedError("its widths are unusual")
        more = -n_out % self.panel
        weight = torch.cat([linear.weight.detach() for linear in linears]).to(self.variant.dtype)
        weight = nn.functional.pad(weight, (0, 0, 0, more)).view(-1, self.panel, n_in)
        if self.variant.dtype == torch.bfloat16:
            weight = weight.view(-1, self.panel, n_in // 2, 2)
        bias = torch.cat([linear.bias.detach() for linear in linears])
        return weight.transpose(1, 2).contiguous(), nn.functional.pad(bias, (0, more))


def c_norm(norm: nn.LayerNorm) -> CNorm:
    """Return a norm as the functions read it."""
    return CNorm(norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps)


def n_outputs(linears: Sequence[nn.Linear]) -> int:
    """Return how many numbers Linear layers with the same input give together."""
    return sum(linear.out_features for linear in linears)


def find_kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """Return the functions for products of a dtype; None where this machine cannot use them."""
    # They use one thread, as a process that embeds has by default; torch would use all of several.
    is_for_them = device.type == "cpu" and torch.get_num_threads() == 1
    return _choose(dtype, cpu_limit()) if is_for_them else None


@cache
def _choose(dtype: torch.dtype, _limit: str | None) -> Kernels | None:
    """Return the best variant for this CPU, as far as the limit lets it be used."""
    reasons = []
    for variant in VARIANTS:
        if variant.dtype == dtype and is_for_this_cpu(variant.needs):
            try:
                return Kernels(compiled_path(), variant)
            except OSError as error:
                reasons.append(error)
    if reasons:
        logger.warning("%s", tell_missing(reasons[-1]))
    return None
