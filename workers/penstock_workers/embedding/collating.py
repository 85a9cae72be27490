"""Batches as a model's first module takes them: split into texts, and built from texts."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from penstock.errors import ModelLoadError
from penstock_workers.embedding.tokenizing import Encoded, gather, unpad
from penstock_workers.hardware.copies import upload


class Collator(Protocol):
    """Knows the batches of one kind of first module."""

    def preprocess(self, texts: Sequence[Any], prompt: str | None) -> list[Encoded]:
        """Return each text, or pair, as the module's own `preprocess` encodes it."""

    def collate(self, texts: Sequence[Encoded], device: torch.device) -> dict[str, Tensor]:
        """Return a batch of texts on a device; all texts have the same features."""


class PaddedCollator:
    """Rectangles of tokens: for transformers and tables of words."""

    def __init__(self, model: SentenceTransformer | CrossEncoder, padding_side: str = "right") -> None:
        self._model, self._side = model, padding_side
        self._padding = {"input_ids": getattr(model.tokenizer, "pad_token_id", None) or 0}
        self._wants_lengths = False

    def preprocess(self, texts: Sequence[Any], prompt: str | None) -> list[Encoded]:
        """See `Collator.preprocess`."""
        found = self._model.preprocess(texts, prompt=prompt)
        self._wants_lengths = "sentence_lengths" in found
        return unpad(found)

    def collate(self, texts: Sequence[Encoded], device: torch.device) -> dict[str, Tensor]:
        """See `Collator.collate`."""
        batch = {
            key: upload(
                nn.utils.rnn.pad_sequence(
                    [torch.from_numpy(text.part(key)) for text in texts],
                    True,
                    padding_value=self._padding.get(key, 0),
                    padding_side=self._side,
                ),
                device,
            )
            for key in texts[0].rows
        }
        if self._wants_lengths:
            batch["sentence_lengths"] = torch.tensor([text.n_tokens for text in texts])
        return batch


class BagCollator:
    """Tokens end to end, and where each text begins: for static embeddings."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model

    def preprocess(self, texts: Sequence[Any], prompt: str | None) -> list[Encoded]:
        """See `Collator.preprocess`."""
        found = self._model.preprocess(list(texts), prompt=prompt)
        row = {"input_ids": found["input_ids"].numpy()}
        starts = found["offsets"].tolist()
        ends = [*starts[1:], len(row["input_ids"])]
        return [Encoded(row, start, end - start, None) for start, end in zip(starts, ends, strict=True)]

    def collate(self, texts: Sequence[Encoded], device: torch.device) -> dict[str, Tensor]:
        """See `Collator.collate`."""
        lengths = torch.tensor([text.n_tokens for text in texts])
        return {
            "input_ids": upload(gather(texts, "input_ids"), device),
            "offsets": upload(lengths.cumsum(0) - lengths, device),
        }


class CountCollator:
    """Vectors that count words, made outside of any layer: for bags of words."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._module: Any = model[0]

    def preprocess(self, texts: Sequence[Any], prompt: str | None) -> list[Encoded]:
        """See `Collator.preprocess`."""
        rows = [
            np.array(self._module.tokenizer.tokenize((prompt or "") + text), dtype=np.int64) for text in texts
        ]
        return [Encoded({"input_ids": row}, 0, len(row), None) for row in rows]

    def collate(self, texts: Sequence[Encoded], device: torch.device) -> dict[str, Tensor]:
        """See `Collator.collate`."""
        found = self._module.get_sentence_features([text.part("input_ids").tolist() for text in texts])
        return {key: upload(value, device) for key, value in found.items()}


def choose_collator(model: SentenceTransformer) -> Collator:
    """Return the collator for a model."""
    if hasattr(model[0], "get_sentence_features"):
        return CountCollator(model)
    return BagCollator(model) if "offsets" in model.preprocess(["a"]) else PaddedCollator(model)


def set_padding(tokenizer: object) -> None:
    """Give a tokenizer without a padding token one; masks say where padding is, so any token will do."""
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.pad_token is None:
        tokenizer.pad_token = (
            tokenizer.eos_token or tokenizer.unk_token or str(tokenizer.convert_ids_to_tokens(0))
        )


def check_vocabulary(name: str, model: SentenceTransformer | CrossEncoder) -> int | None:
    """Return how many tokens a model knows, if its tokenizer has added tokens that it does not know.

    Raises:
        ModelLoadError: The tokenizer's own vocabulary is larger than the model's table.
    """
    transformer, tokenizer = model.transformers_model, model.tokenizer
    if transformer is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    table = transformer.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        return None
    if tokenizer.vocab_size > table.num_embeddings:
        raise ModelLoadError(
            name, f"the tokenizer has {tokenizer.vocab_size} tokens, the model {table.num_embeddings}"
        )
    last = max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder, 0)
    return table.num_embeddings if last >= table.num_embeddings else None
