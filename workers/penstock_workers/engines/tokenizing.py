"""Texts to tokens as a sentence-transformers model takes them, without padding."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, repeat
from typing import Any, Final, Self

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Encoding, Tokenizer
from torch import Tensor

AT_ONCE: Final = 256
"""Texts that one call of a tokenizer gets."""
FOREIGN: Final = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model's own code may raise when it meets what it was not made for."""
_READERS: Final[Mapping[str, Callable[[Sequence[Encoding]], Iterable[int]]]] = {
    "input_ids": lambda texts: chain.from_iterable(text.ids for text in texts),
    "token_type_ids": lambda texts: chain.from_iterable(text.type_ids for text in texts),
    "attention_mask": lambda texts: repeat(1, sum(map(len, texts))),  # nothing is padded
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One tokenized text.

    Attributes:
        features: what the model takes, each integer, shape (n_tokens,).
        n_tokens: real tokens, special ones counted.
        prompt_length: tokens of the prompt that pooling leaves out, else None.
    """

    features: dict[str, Tensor]
    n_tokens: int
    prompt_length: int | None

    def equals(self, other: "Encoded") -> bool:
        """Whether the other is the same text."""
        return (
            self.prompt_length == other.prompt_length
            and self.features.keys() == other.features.keys()
            and all(torch.equal(value, other.features[key]) for key, value in self.features.items())
        )

    def of_length(self, n_tokens: int) -> Self:
        """Return a text of this many tokens, cut or repeated."""
        repeats = -(-n_tokens // self.n_tokens)
        features = {key: value.repeat(repeats)[:n_tokens] for key, value in self.features.items()}
        return replace(self, features=features, n_tokens=n_tokens)

    def reversed(self) -> Self:
        """Return another text of the same length."""
        return replace(self, features={key: value.flip(0) for key, value in self.features.items()})


class TextTokenizer:
    """What `preprocess` of a model gives, straight from its tokenizer where that gives the same.

    `preprocess` takes twice the tokenizer's own time, in Python, where the model's thread has to wait for it;
    padding to tensors takes as long again.

    Args:
        model: whose tokens they are.
        probe: texts that both ways are compared on.
        n_at_once: how many threads may tokenize at the same time.

    Attributes:
        is_straight: whether nothing stands between.
    """

    def __init__(self, model: SentenceTransformer, probe: Sequence[str], n_at_once: int = 1) -> None:
        self._model, self._n_at_once = model, n_at_once
        self._places = threading.Semaphore(n_at_once)
        self._taking_all = threading.Lock()
        self._prompt_length = lru_cache(maxsize=32)(self._find_prompt_length)  # a prompt may be long
        self._tokenizer: Tokenizer | None = getattr(
            getattr(model, "tokenizer", None), "backend_tokenizer", None
        )
        self._keys: list[str] = []
        self.is_straight = self._compare([*probe, " with space around it\n"])

    def encode(self, texts: Sequence[str], prompt: str | None) -> list[Encoded]:
        """Tokenize texts with a prompt before each; safe to call in many threads."""
        encode = self._encode if self.is_straight else self._preprocess
        return [
            text
            for start in range(0, len(texts), AT_ONCE)
            for text in encode(list(texts[start : start + AT_ONCE]), prompt)
        ]

    def _compare(self, probe: list[str]) -> bool:
        """Whether texts are the same both ways."""
        prompts = (None, "query: ")
        expected = [text for prompt in prompts for text in self._preprocess(probe, prompt)]
        self._keys = list(expected[0].features)
        try:
            found = [text for prompt in prompts for text in self._encode(probe, prompt)]
        except FOREIGN:
            return False
        return len(found) == len(expected) and all(map(Encoded.equals, found, expected))

    def _encode(self, texts: list[str], prompt: str | None) -> list[Encoded]:
        if not isinstance(self._tokenizer, Tokenizer):
            raise TypeError("its tokenizer is in Python")
        prompt_length = self._prompt_length(prompt)
        with self._places:
            # how long a text may be is set by `preprocess`, which was called before
            found = self._tokenizer.encode_batch_fast([prompt + text for text in texts] if prompt else texts)
        lengths = list(map(len, found))
        # one tensor of all texts: one for each would take longer than the tokenizer
        rows = [
            torch.from_numpy(np.fromiter(_READERS[key](found), np.int64, sum(lengths))).split(lengths)  # type: ignore[no-untyped-call]  # torch's own gap
            for key in self._keys
        ]
        return [
            Encoded(
                features=dict(zip(self._keys, text, strict=True)),
                n_tokens=n_tokens,
                prompt_length=prompt_length,
            )
            for n_tokens, text in zip(lengths, zip(*rows, strict=True), strict=True)
        ]

    def _preprocess(self, texts: list[str], prompt: str | None) -> list[Encoded]:
        with self._alone():
            found = unpad(self._model.preprocess(texts, prompt=prompt))
            if isinstance(self._tokenizer, Tokenizer):
                self._tokenizer.no_padding()
            return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep all others out: a fast tokenizer refuses to be changed while it is in use."""
        with ExitStack() as places, self._taking_all:
            for _ in range(self._n_at_once):
                places.enter_context(self._places)
            yield

    def _find_prompt_length(self, prompt: str | None) -> int | None:
        return self._preprocess(["a"], prompt)[0].prompt_length


def unpad(padded: dict[str, Any]) -> list[Encoded]:
    """Return each text of a padded batch by itself."""
    mask = padded["attention_mask"].bool()
    keys = [key for key, value in padded.items() if torch.is_tensor(value) and value.shape == mask.shape]
    prompt_length = padded.get("prompt_length")
    return [
        Encoded(
            features={key: padded[key][row][mask[row]] for key in keys},
            n_tokens=int(mask[row].sum()),
            prompt_length=None if prompt_length is None else int(prompt_length),
        )
        for row in range(len(mask))
    ]
