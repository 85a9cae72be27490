"""The texts that every way to compute vectors is tried on: how it is compared, and how it is timed."""

import time
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from penstock_workers.embedding.tokenizing import Encoded
from penstock_workers.embedding.way import Way, compute

MIN_COSINE: Final = 0.9999
"""Smallest cosine between a vector of a faster way and that of the model's own modules."""
# Lengths and scripts, code, and nearly nothing.
PROBE: Final = (
    "a",
    "?",
    "A penstock is the pipe, with its gate, that feeds a turbine.",
    "def mean(xs):\n    return sum(xs) / len(xs)",
    "1 2 3 4 5 6 7 8 9 10",
    "naïve café, Ångström, Übergröße",
    "Привет, как дела? Это проверка.",
    "你好，世界。这是一个测试。",
    "日本語のテキストも埋め込めます。",
    "مرحبا بالعالم، هذا اختبار",
    "हिन्दी में एक छोटा वाक्य",
    "🙂 🙃 🚀",
    "the " * 40,
    "Services enqueue jobs and workers answer them with arrays. " * 12,
    "x = 3.14159; " * 120,
)
N_PADDED: Final = 4
"""Texts of the probe that are padded to one batch."""
N_OWN_WORDS: Final = 32
"""Words from the vocabulary of a tokenizer without special tokens: it may know none of the probe's words."""
GPU_REPEATS: Final = 16
"""Times that the probe is in a timed batch on a GPU, which takes as long for a few texts as for hundreds."""
RACE: Final = ((12, 40), (32, 16), (96, 6), (256, 2))
"""Batches that a graph and torch are timed on: tokens of the longest text, and number of texts."""


def probe_texts(tokenizer: object) -> tuple[str, ...]:
    """Return the texts that a model is tried on, with some that its own tokenizer knows."""
    return (*PROBE, *_own_words(tokenizer))


class Probe:
    """A model's vectors for the probe's texts, and what other ways make of the same texts.

    Attributes:
        texts: The texts of the probe, each of at least one token.
        plain: Vectors by the model's own modules, each text alone; float32, shape (n_texts, dim).

    Args:
        name: Name of the model.
        texts: See the attribute; at least one.
        plain: The way that `plain` is computed in.

    Raises:
        Exception: The model's own code fails at a text.
    """

    def __init__(self, name: str, texts: Sequence[Encoded], plain: Way) -> None:
        self._name, self.texts = name, list(texts)
        self.plain = self._embed(plain, self.texts, [[i] for i in range(len(self.texts))])

    @property
    def longest(self) -> Encoded:
        """Return the longest text."""
        return max(self.texts, key=lambda text: text.n_tokens)

    def compare(self, way: Way) -> str | None:
        """Return why a way must not be used, or None.

        Its vectors have to keep their directions, and a text must not see its batch mates: every second text
        is replaced by another of the same length, which may not change the vectors of the rest.

        Raises:
            Exception: The model's own code, or a compiler's, fails at a text.
        """
        groups = self._groups(way)
        replaced = [text.reversed() if i % 2 else text for i, text in enumerate(self.texts)]
        together = self._embed(way, self.texts, groups)
        among_others = self._embed(way, replaced, groups)
        worst = _worst_cosine(self.plain, together)
        if way.name == "padded, OpenVINO":  # traced with two texts, so one alone may differ
            alone = self._embed(way, self.texts, [[i] for i in range(len(self.texts))])
            worst = min(worst, _worst_cosine(self.plain, alone))
        if worst < MIN_COSINE:
            return f"{way.name} vectors differ: cosine {worst:.5f}"
        if not np.allclose(together[::2], among_others[::2], atol=1e-5 * np.abs(together).max()):
            return "a text sees its neighbours"
        return None

    def time(self, way: Way) -> float:
        """Return the seconds that a way takes for the probe. Compare it before: first runs take longer."""
        n_times = 1 if way.device.type == "cpu" else GPU_REPEATS
        groups = [[text] for text in self.texts] if way.name == "padded" else [self.texts]
        batches = [group * n_times for group in groups]
        start = time.perf_counter()
        for batch in batches:
            compute(way, batch, self._name)
        return time.perf_counter() - start

    def race(self, way: Way) -> float:
        """Return the seconds that a way takes for batches such as the batcher cuts, the best of three runs.

        The texts of a batch are up to an eighth shorter than the longest.
        """
        text = self.longest
        batches = []
        for most_tokens, n_texts in RACE:
            longest = min(most_tokens, text.n_tokens)
            lengths = (longest - i * (longest // 8) // n_texts for i in range(n_texts))
            batches.append([text.of_length(length) for length in lengths])
        found = []
        for _ in range(1 + 3):  # the first has more to do
            start = time.perf_counter()
            for batch in batches:
                compute(way, batch, self._name)
            found.append(time.perf_counter() - start)
        return min(found[1:])

    def _groups(self, way: Way) -> list[list[int]]:
        """Return which texts a way is to embed together."""
        order = list(range(len(self.texts)))
        if way.name != "padded":
            return [order]
        order.sort(key=lambda i: self.texts[i].n_tokens)  # similar lengths: padding costs time
        return [order[i : i + N_PADDED] for i in range(0, len(order), N_PADDED)]

    def _embed(
        self, way: Way, texts: Sequence[Encoded], groups: Sequence[Sequence[int]]
    ) -> NDArray[np.float32]:
        """Return the vectors in the order of the texts; shape (n_texts, dim)."""
        found = [compute(way, [texts[i] for i in group], self._name) for group in groups]
        return np.concatenate(found)[np.argsort([i for group in groups for i in group])]


def _own_words(tokenizer: object) -> Iterator[str]:
    """Yield texts that one tokenizer knows: its special tokens, as if somebody typed them, or its words."""
    special = getattr(tokenizer, "all_special_tokens", None)
    if special:
        yield f"a {' gate '.join(dict.fromkeys(special))} water"
        return
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    known = inner.get_vocab() if isinstance(inner, Tokenizer) else getattr(inner, "vocab", ())
    yield " ".join(list(known)[:N_OWN_WORDS])


def _worst_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.nan_to_num((a * b).sum(axis=1) / norms, nan=-1).min())
