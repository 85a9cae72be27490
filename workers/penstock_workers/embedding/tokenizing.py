"""Texts to tokens as a sentence-transformers model takes them, without padding."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any, Final, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tokenizers import Encoding, Tokenizer
from torch import Tensor

AT_ONCE: Final = 256
"""Texts in one call of a tokenizer."""
FOREIGN: Final = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""Errors that a model's own code may raise when it meets something it was not made for."""


class Encoded(NamedTuple):
    """One tokenized text: a part of rows that many texts share, since arrays of its own would cost more.

    Attributes:
        rows: Features that the model takes, by name; int64, shape (n_row,) each.
        start: Index of the text's first token in the rows.
        n_tokens: Number of tokens, special ones included.
        prompt_length: Number of tokens of the prompt, if pooling leaves them out, else None.
    """

    rows: Mapping[str, NDArray[np.int64]]
    start: int
    n_tokens: int
    prompt_length: int | None

    def part(self, key: str) -> NDArray[np.int64]:
        """Return this text's part of a row, int64, shape (n_tokens,)."""
        return self.rows[key][self.start : self.start + self.n_tokens]

    def equals(self, other: "Encoded") -> bool:
        """Tell whether another text has the same tokens."""
        return (
            self.prompt_length == other.prompt_length
            and self.rows.keys() == other.rows.keys()
            and all(np.array_equal(self.part(key), other.part(key)) for key in self.rows)
        )

    def of_length(self, n_tokens: int) -> Self:
        """Return a text of this many tokens: this one, cut or repeated."""
        rows = {key: np.resize(self.part(key), n_tokens) for key in self.rows}
        return self._replace(rows=rows, start=0, n_tokens=n_tokens)

    def reversed(self) -> Self:
        """Return another text of the same length: this one, backwards."""
        return self._replace(rows={key: self.part(key)[::-1].copy() for key in self.rows}, start=0)


def gather(texts: Sequence[Encoded], key: str) -> Tensor:
    """Lay a feature of several texts end to end; int64, shape (n_tokens of all texts,)."""
    return torch.from_numpy(np.concatenate([text.part(key) for text in texts]))


class TextTokenizer:
    """Tokenizes as `preprocess` of a model does, straight by its tokenizer where that gives the same.

    `preprocess` takes twice the time of the tokenizer itself, in Python, where the model's thread has to wait
    for it. Padding to tensors takes as long again.

    Args:
        model: The model that the tokens are for.
        probe: Texts on which the two are compared.
        n_at_once: Number of threads that may tokenize at the same time.
        preprocess: See `Collator.preprocess`; None: the model's own, with its padding removed.

    Attributes:
        is_straight: Tells that the tokenizer is called directly.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        probe: Sequence[str],
        n_at_once: int = 1,
        preprocess: Callable[[Sequence[Any], str | None], list[Encoded]] | None = None,
    ) -> None:
        self._n_at_once = n_at_once
        self._ask = preprocess or (lambda texts, prompt: unpad(model.preprocess(list(texts), prompt=prompt)))
        self._places = threading.Semaphore(n_at_once)
        self._taking_all = threading.Lock()
        self._prompt_length = lru_cache(maxsize=32)(self._find_prompt_length)  # a prompt may be long
        self._tokenizer: Tokenizer | None = getattr(
            getattr(model, "tokenizer", None), "backend_tokenizer", None
        )
        self._keys: list[str] = []
        self._has_one_type = False
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
        """Tell whether texts get the same tokens both ways."""
        prompts = (None, "query: ")
        expected = [text for prompt in prompts for text in self._preprocess(probe, prompt)]
        self._keys = list(expected[0].rows)
        types = [text.part("token_type_ids") for text in expected if "token_type_ids" in text.rows]
        self._has_one_type = not any(part.any() for part in types)
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
            # `preprocess`, which was called before, has set how long a text may be
            found = self._tokenizer.encode_batch_fast([prompt + text for text in texts] if prompt else texts)
        lengths = list(map(len, found))
        n_tokens = sum(lengths)
        rows = {key: self._read(key, found, n_tokens) for key in self._keys}
        starts = accumulate(lengths, initial=0)
        return [
            Encoded(rows, start, length, prompt_length)
            for start, length in zip(starts, lengths, strict=False)
        ]

    def _read(self, key: str, found: Sequence[Encoding], n_tokens: int) -> NDArray[np.int64]:
        if key == "attention_mask":
            return np.ones(n_tokens, np.int64)  # nothing is padded
        if key == "token_type_ids" and self._has_one_type:
            return np.zeros(n_tokens, np.int64)
        read = {"input_ids": attrgetter("ids"), "token_type_ids": attrgetter("type_ids")}[key]
        return np.fromiter(chain.from_iterable(map(read, found)), np.int64, n_tokens)

    def _preprocess(self, texts: list[str], prompt: str | None) -> list[Encoded]:
        with self._alone():
            found = self._ask(texts, prompt)
            if isinstance(self._tokenizer, Tokenizer):
                self._tokenizer.no_padding()
            return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep all other threads out: a fast tokenizer refuses to be changed while it is in use."""
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
            rows={key: padded[key][row][mask[row]].numpy() for key in keys},
            start=0,
            n_tokens=int(mask[row].sum()),
            prompt_length=None if prompt_length is None else int(prompt_length),
        )
        for row in range(len(mask))
    ]
