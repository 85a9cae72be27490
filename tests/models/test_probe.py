"""What the probe finds out about a way: turned vectors, texts that see each other, and which is slower."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from penstock_workers.embedding.probe import PROBE, Probe, probe_texts
from penstock_workers.embedding.tokenizing import Encoded
from penstock_workers.embedding.way import Way, WayName

DIM = 8


class FakeWay:
    """A way whose vectors are sums of random ones for each token and its place; `change` spoils them."""

    dtype = "float32"
    is_padded = False
    device = torch.device("cpu")

    def __init__(
        self, name: WayName = "packed", change: Callable[[Tensor], Tensor] = lambda vectors: vectors
    ) -> None:
        self.name, self._change = name, change
        self.batches: list[int] = []
        self._table = torch.randn(100, DIM, generator=torch.Generator().manual_seed(0))

    def embed(self, texts: Sequence[Encoded], features: Mapping[str, Any]) -> Tensor:
        """See `Way.embed`."""
        assert features == {"prompt_length": 2}
        self.batches.append(len(texts))
        vectors = [self._sum(torch.from_numpy(text.part("input_ids"))) for text in texts]
        return self._change(F.normalize(torch.stack(vectors), dim=1))

    def close(self) -> None:
        """See `Way.close`."""

    def settle(self) -> None:
        """See `Way.settle`."""

    def _sum(self, ids: Tensor) -> Tensor:
        places = torch.arange(1, len(ids) + 1)[:, None]
        return (self._table[ids] * places).sum(dim=0)


def texts_of(lengths: Sequence[int]) -> list[Encoded]:
    """Random texts of so many tokens."""
    rng = np.random.default_rng(0)
    return [Encoded({"input_ids": rng.integers(0, 100, n)}, 0, n, 2) for n in lengths]


LENGTHS = [3, 90, 7, 7, 33, 256, 8, 2, 34]


@pytest.mark.parametrize("name", ["packed", "padded", "padded, OpenVINO"])
def test_the_same_vectors_are_not_refused(name: WayName) -> None:
    """A way that gives what the model's own modules give may be used, however it groups texts."""
    way: Way = FakeWay(name)

    probe = Probe("small", texts_of(LENGTHS), FakeWay("padded"))

    assert probe.plain.shape == (len(LENGTHS), DIM)
    assert probe.compare(way) is None


def test_texts_are_alone_for_the_modules_and_together_for_a_way() -> None:
    """What others are held against never sees another text; padded batches hold texts of like length."""
    own, packed, padded, graph = (
        FakeWay(name) for name in ("padded", "packed", "padded", "padded, OpenVINO")
    )
    n = len(LENGTHS)

    probe = Probe("small", texts_of(LENGTHS), own)
    for way in (packed, padded, graph):
        probe.compare(way)

    assert own.batches == [1] * n
    assert packed.batches == [n, n]
    assert padded.batches == [4, 4, 1] * 2
    assert graph.batches == [n, n, *[1] * n]


def test_turned_vectors_are_refused() -> None:
    """A direction that is lost is told with its cosine."""
    probe = Probe("small", texts_of(LENGTHS), FakeWay("padded"))

    reason = probe.compare(FakeWay(change=lambda vectors: vectors + 0.05))

    assert reason is not None
    assert reason.startswith("packed vectors differ: cosine 0.9")


def test_texts_that_see_each_other_are_refused() -> None:
    """A vector that depends a little on its batch mates keeps its direction, and is found out."""

    def mix(vectors: Tensor) -> Tensor:
        return vectors + 1e-3 * vectors.roll(1, dims=0)

    probe = Probe("small", texts_of(LENGTHS), FakeWay("padded"))

    assert probe.compare(FakeWay(change=mix)) == "a text sees its neighbours"


def test_vectors_that_are_not_finite_are_refused() -> None:
    """Not a number has no direction."""
    probe = Probe("small", texts_of(LENGTHS), FakeWay("padded"))

    assert probe.compare(FakeWay(change=lambda vectors: vectors * torch.nan)) is not None


def test_a_slower_way_takes_longer() -> None:
    """Both clocks tell a way that waits from one that does not."""

    def wait(vectors: Tensor) -> Tensor:
        time.sleep(0.01)
        return vectors

    probe = Probe("small", texts_of(LENGTHS), FakeWay("padded"))
    quick, slow = FakeWay(), FakeWay(change=wait)

    assert probe.time(slow) > probe.time(quick)
    assert probe.race(slow) > probe.race(quick)


def test_a_tokenizers_own_words_are_tried() -> None:
    """Its special tokens, as somebody may type them; where it has none, its vocabulary."""

    class Special:
        all_special_tokens = ("[CLS]", "[SEP]", "[CLS]")

    class Plain:
        vocab = ("gate", "lake")

    assert probe_texts(Special()) == (*PROBE, "a [CLS] gate [SEP] water")
    assert probe_texts(Plain()) == (*PROBE, "gate lake")
