"""What tokens say, whatever the tokenizer: in pieces, all at once, and as the tokenizer itself has it."""

import random
from collections.abc import Sequence
from functools import cache

import pytest
from transformers import PreTrainedTokenizerBase

from penstock_workers.generation.detokenizer import Detokenizer
from tests.models.odd_tokenizers import TOKENIZERS

FALLBACK = "byte fallback"
SCRIPTS = ["水", "😀", "é", "a", " ", "བཀྲ", "👩‍👩‍👧", "🏳️‍🌈", "\n", "\ufffd"]


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer of that kind."""
    return TOKENIZERS[kind]()


@cache
def detokenizer(kind: str) -> Detokenizer:
    """Return what reads its tokens."""
    return Detokenizer(tokenizer(kind))


def draw(kind: str, seed: int) -> tuple[list[int], list[int]]:
    """Return a prompt that ends in whole characters, and random tokens behind it."""
    chance = random.Random(f"{kind} {seed}")
    vocab = range(len(tokenizer(kind)))
    prompt = tokenizer(kind)("Hello water a b", add_special_tokens=False)["input_ids"]
    return list(prompt) if seed % 2 else [], chance.choices(vocab, k=chance.choice([1, 3, 30, 90]))


def say(kind: str, prompt: Sequence[int], *groups: Sequence[int]) -> list[str]:
    """Return the pieces that groups of tokens add behind a prompt, and the rest."""
    reads = detokenizer(kind)
    stream = reads.begin(reads.context(prompt))
    return [*map(stream.add, groups), stream.end()]


def spell(kind: str, text: str) -> list[int]:
    """Return tokens of single bytes where a tokenizer has them, else its own."""
    known = tokenizer(kind)
    if kind.startswith(FALLBACK):
        return [known.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    return list(known(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_the_text_however_they_are_cut(kind: str) -> None:
    """One by one, all at once, and in any groups: put together, the same."""
    for seed in range(60):
        prompt, tokens = draw(kind, seed)
        cuts = sorted(random.Random(seed).choices(range(len(tokens) + 1), k=4))
        groups = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]

        whole = "".join(say(kind, prompt, tokens))

        assert "".join(say(kind, prompt, *([token] for token in tokens))) == whole
        assert "".join(say(kind, prompt, *groups)) == whole


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if not kind.startswith(FALLBACK)])
def test_text_is_what_the_tokenizer_says_behind_the_prompt(kind: str) -> None:
    """The first space, and what a decoder strips, joins or cleans, are as in prompt and answer together."""
    for seed in range(60):
        prompt, tokens = draw(kind, seed)

        said = "".join(say(kind, prompt, tokens))

        reads = detokenizer(kind)
        assert reads.text(prompt) + said == reads.text([*prompt, *tokens])


@pytest.mark.parametrize("kind", ["byte level", "byte level, stripped", FALLBACK, "bytes, in Python"])
def test_long_runs_of_bytes_are_their_characters(kind: str) -> None:
    """Characters come when their last byte does, however long no token is more than a byte."""
    for seed in range(30):
        text = "".join(random.Random(seed).choices(SCRIPTS, k=60))
        prompt, tokens = spell(kind, "Hello"), spell(kind, text)

        pieces = say(kind, prompt, *([token] for token in tokens))

        assert "".join(pieces) == text
        assert not any(piece.endswith("\ufffd") for piece in pieces if "\ufffd" not in text)
        assert len(list(filter(None, pieces))) > len(text) / 3


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b"a\xff\xfeb", "a��b"),
        (b"\xe6\x97 ok", "�� ok"),
        ("日".encode() + b"\xe6" + "本".encode(), "日�本"),
        (b"\xff" * 90, "�" * 90),
        (b"\xe6\x97", "��"),
    ],
)
def test_bytes_that_are_no_characters_stay_marked(said: bytes, text: str) -> None:
    """Each is one U+FFFD, what is whole around it stays, and an answer goes on behind it."""
    tokens = [tokenizer(FALLBACK).convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in said]

    assert "".join(say(FALLBACK, [], *([token] for token in tokens))) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_token_costs_the_same_at_the_end_of_a_long_answer(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the answer, no more tokens than a window holds are looked at for the next."""
    reads, widths = detokenizer(kind), [0]
    plain = Detokenizer.text
    tokens = random.Random(0).choices(range(len(tokenizer(kind))), k=400)
    stream = reads.begin()
    stream.add(tokens)

    def text(self: Detokenizer, ids: Sequence[int]) -> str:
        widths.append(len(ids))
        return plain(self, ids)

    monkeypatch.setattr(Detokenizer, "text", text)
    stream.add(tokens[:50])

    assert max(widths) <= 64
    assert sum(widths) <= 50 * 64
