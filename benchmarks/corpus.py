"""The texts that embedding is measured with: docstrings of the standard library, in a fixed random order."""

import inspect
import json
import pkgutil
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from typing import Final

import numpy as np
from tokenizers import Tokenizer

MODULES: Final = ("collections", "email", "http", "importlib", "json", "logging", "unittest", "wsgiref")
SHORT_TOKENS: Final = 16
LONG_EVERY: Final = 16


class Corpus:
    """Texts by their length in a model's tokens, special ones counted; the same in every run.

    Args:
        model: folder of a sentence-transformers model.
    """

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.max_tokens: int = json.loads((model / "sentence_bert_config.json").read_text())["max_seq_length"]
        self._tokenizer.enable_truncation(self.max_tokens)
        self._tokenizer.no_padding()
        self._docstrings = _docstrings()
        self._words = " ".join(self._docstrings).split()

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text after truncation to the model's limit."""
        return [len(encoded.ids) for encoded in self._tokenizer.encode_batch(list(texts))]

    def mixed(self, n_texts: int) -> list[str]:
        """Return whole docstrings: from a few tokens to more than the model's limit."""
        return list(islice(cycle(self._docstrings), n_texts))

    def short(self, n_texts: int) -> list[str]:
        """Return phrases of at most 16 tokens, as search queries are."""
        return list(islice(self._phrases(), n_texts))

    def long(self, n_texts: int) -> list[str]:
        """Return passages that fill the model's limit and are cut by little."""
        return list(islice(self._passages(), n_texts))

    def many(self, n_texts: int) -> Iterator[str]:
        """Yield any number of texts, none twice, made as they are read: a docstring after 15 phrases."""
        phrases, docstrings = cycle(self.short(4096)), cycle(self._docstrings)
        for number in range(n_texts):
            yield f"{number} {next(phrases if number % LONG_EVERY else docstrings)}"

    def _phrases(self) -> Iterator[str]:
        random, start = np.random.default_rng(1), 0
        while True:
            n_words = int(random.integers(2, 12))
            phrase = " ".join(self._words[start : start + n_words])
            start = (start + n_words) % len(self._words)
            if self.lengths([phrase])[0] <= SHORT_TOKENS:
                yield phrase

    def _passages(self) -> Iterator[str]:
        start = 0
        while True:
            start %= len(self._words) - self.max_tokens  # one token is one word at most
            n_words = next(
                n
                for n in range(self.max_tokens // 4, self.max_tokens + 1, 8)
                if self.lengths([" ".join(self._words[start : start + n])])[0] == self.max_tokens
            )
            yield " ".join(self._words[start : start + n_words])
            start += n_words


def _docstrings() -> list[str]:
    found: dict[str, None] = {}
    for name in MODULES:
        package = import_module(name)
        names = [name, *(f"{name}.{module.name}" for module in pkgutil.iter_modules(package.__path__))]
        for module in map(import_module, (n for n in names if not n.endswith("__main__"))):
            for _, thing in sorted(inspect.getmembers(module), key=lambda member: member[0]):
                members = inspect.getmembers(thing) if inspect.isclass(thing) else []
                for one in [thing, *(member for _, member in members)]:
                    text = inspect.getdoc(one) if callable(one) else None
                    if text and len(text) > 20:
                        found[text] = None
    texts = list(found)
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
