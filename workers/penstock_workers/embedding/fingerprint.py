"""What decides a model's vectors, as one hash: another hash, other vectors."""

import hashlib
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from penstock_workers.settings import ModelSettings


def hash_model(model: SentenceTransformer, settings: ModelSettings) -> str:
    """Return a hash of a loaded model; takes less than a second for a gigabyte of weights."""
    # The files' names are not enough: the model in a folder may be trained further in place.
    tokenizer: Any = model.tokenizer
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    parts = (settings.source, settings.revision, settings.dtype, model.max_seq_length, model)
    found = hashlib.sha256(repr(parts).encode())
    if isinstance(tokenizer, Tokenizer):
        found.update(tokenizer.to_str().encode())
    elif model.transformers_model is None:  # words, and the weight of each
        first: Any = model[0]
        found.update(repr((getattr(tokenizer, "vocab", None), first.get_config_dict())).encode())
    for key, value in model.state_dict().items():
        found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
