"""Tokens without padding against those of sentence-transformers' own `preprocess`."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from penstock_workers.bundled import bundled_folder
from penstock_workers.embedding.probe import PROBE
from penstock_workers.embedding.tokenizing import Encoded, TextTokenizer, unpad
from tests.models.test_embedding import corpus

ODD = [
    "https://example.org/cat.png",
    "  space \n around ",
    "UPPER",
    "word " * 1000,
    "e\u0301",
    "\u200b",
    "</s>[SEP]",
]


@pytest.fixture
def model() -> SentenceTransformer:
    """The bundled model."""
    return SentenceTransformer(str(bundled_folder("minilm")), device="cpu")


def are_equal(found: list[Encoded], expected: list[Encoded]) -> bool:
    """Whether all texts are the same, their lengths too."""
    return all(
        a.equals(b) and a.n_tokens == b.n_tokens == len(a.part("input_ids"))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize(
    "prompt", [None, "", "query: ", "word " * 400], ids=["none", "empty", "short", "long"]
)
def test_tokens_are_those_of_preprocess(
    model: SentenceTransformer, prompt: str | None, include_prompt: bool
) -> None:
    """Whatever the texts hold, and however long a prompt is."""
    model.set_pooling_include_prompt(include_prompt)
    tokenizer, texts = TextTokenizer(model, PROBE), [*corpus(300), *ODD]

    found = tokenizer.encode(texts, prompt)

    assert tokenizer.is_straight
    assert are_equal(found, [unpad(model.preprocess([text], prompt=prompt))[0] for text in texts])


@pytest.mark.parametrize("n_at_once", [1, 4])
def test_many_threads_may_tokenize(model: SentenceTransformer, n_at_once: int) -> None:
    """Also while others need the model's own way, which changes the tokenizer's settings."""
    tokenizer, texts = TextTokenizer(model, PROBE, n_at_once), corpus(64)
    expected = tokenizer.encode(texts, None)

    def tokenize(number: int) -> list[Encoded]:
        tokenizer.encode(texts, f"prompt {number}: ")  # how long a new prompt is, `preprocess` tells
        return tokenizer.encode(texts, None)

    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(tokenize, range(64)):
            assert are_equal(found, expected)


class Shouting(SentenceTransformer):
    """A model that does to a text what no tokenizer knows of."""

    def preprocess(self, inputs: Any, *args: Any, **options: Any) -> Any:
        """Tokenize the texts with an exclamation mark."""
        return super().preprocess([f"{text} !" for text in inputs], *args, **options)


def test_a_model_with_a_way_of_its_own_is_asked() -> None:
    """Its tokenizer alone would give other tokens."""
    model = Shouting(str(bundled_folder("minilm")), device="cpu")
    tokenizer = TextTokenizer(model, PROBE)

    found = tokenizer.encode(ODD, None)

    assert not tokenizer.is_straight
    assert are_equal(found, unpad(model.preprocess(ODD)))
