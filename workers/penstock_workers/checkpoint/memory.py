"""How much memory a model needs, known before it is loaded: its files say it in their first bytes."""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import get_safetensors_metadata, snapshot_download
from transformers import PreTrainedConfig

from penstock.errors import ModelLoadError
from penstock_workers.hardware.device import free_bytes

LEAST_CACHE_TOKENS: Final = 1024
"""Smallest useful cache, tokens of one request; less where the model's window is shorter."""
_FLOATS: Final = frozenset(("F64", "F32", "F16", "BF16"))
_MOST_HEADER_BYTES: Final = 100 << 20  # the format's own limit
_GIB: Final = 1 << 30


def check_memory(
    name: str,
    weights: int | None,
    devices: Sequence[torch.device],
    *,
    cache: int = 0,
    free: int | None = None,
) -> None:
    """Refuse a model that cannot fit; a model that would nearly fit may try.

    Args:
        name: Name of the model.
        weights: Bytes of its weights, from `weights_bytes`; a model of which they are not known may try.
        devices: Devices that share the model.
        cache: Bytes of the smallest useful cache.
        free: Bytes that may be used; None: what the devices and control groups leave.

    Raises:
        ModelLoadError: The model cannot fit.
    """
    if weights is None:
        return
    free = sum(map(free_bytes, devices)) if free is None else free
    if weights + cache > free:
        where = ", ".join(map(str, devices))
        raise ModelLoadError(
            name,
            f"it needs {_gib(weights + cache)} of memory on {where}, {_gib(weights)} of them for weights,"
            f" and {_gib(free)} are free",
        )


def weights_bytes(source: str, revision: str | None, dtype: torch.dtype) -> int | None:
    """Return the bytes that a model's weights take in memory; None where no safetensors files say it.

    Args:
        source: A folder or a hub id; of a model that is not downloaded only the headers are read.
        revision: Revision at the hub.
        dtype: Format that numbers are loaded in; quantised weights stay as they are stored.
    """
    try:
        tensors = [tensor for header in _headers(source, revision) for tensor in header.values()]
        return sum(_tensor_bytes(tensor, dtype.itemsize) for tensor in tensors) or None
    except Exception:  # noqa: BLE001  whatever is wrong with files or hub: the load says it in its own words
        return None


def cache_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the smallest useful cache; 0 where the configuration does not say it."""
    text = config.get_text_config(decoder=True)
    layers, heads, hidden, window = (
        getattr(text, field, None) or 0
        for field in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings")
    )
    if not all(isinstance(n, int) for n in (layers, heads, hidden, window)) or not heads:
        return 0
    dim = getattr(text, "head_dim", None) or hidden // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    n_tokens = min(LEAST_CACHE_TOKENS, window or LEAST_CACHE_TOKENS)
    return int(2 * layers * kept * dim * dtype.itemsize * n_tokens)


def _headers(source: str, revision: str | None) -> Iterator[Mapping[str, Any]]:
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
        except OSError:  # not downloaded
            remote = get_safetensors_metadata(source, revision=revision).files_metadata
            for each in remote.values():
                yield {key: vars(tensor) for key, tensor in each.tensors.items()}
            return
    for file in _weight_files(folder):
        yield _read_header(file)


def _weight_files(folder: Path) -> Iterator[Path]:
    """Yield the files that are loaded; some folders hold the same weights again for other libraries."""
    modules = folder / "modules.json"  # of sentence-transformers
    parts = {part["path"] for part in json.loads(modules.read_text())} if modules.exists() else set()
    for part in sorted({"", *parts}):
        index = folder / part / "model.safetensors.index.json"
        if index.exists():
            yield from (
                folder / part / file for file in set(json.loads(index.read_text())["weight_map"].values())
            )
        elif (single := folder / part / "model.safetensors").exists():
            yield single


def _read_header(file: Path) -> Mapping[str, Any]:
    """Return the tensors of a file by name, each with its dtype, shape and place.

    Source: The safetensors format: eight bytes of length, little-endian, and JSON.
    """
    with file.open("rb") as opened:
        (n_bytes,) = struct.unpack("<Q", opened.read(8))
        if n_bytes > _MOST_HEADER_BYTES:
            raise ValueError(f"header of {n_bytes} bytes")
        header: dict[str, Any] = json.loads(opened.read(n_bytes))
    return {key: tensor for key, tensor in header.items() if key != "__metadata__"}


def _tensor_bytes(tensor: Mapping[str, Any], itemsize: int) -> int:
    if tensor["dtype"] in _FLOATS:
        return int(math.prod(tensor["shape"]) * itemsize)
    begin, end = tensor["data_offsets"]
    return int(end - begin)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / _GIB:,.2f} GiB"
