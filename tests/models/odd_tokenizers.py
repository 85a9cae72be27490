"""Tokenizers of every kind, made from nothing: what their decoders strip, join and fall back to."""

import string
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

LINES = [
    "The water falls through the penstock and turns the wheel.",
    "When the gate is closed, the water waits above it; it doesn't fall.",
    "Größe und Gefälle bestimmen die Leistung. 水车 日本語 👩‍👩‍👧 🏳️‍🌈",
]
SPECIALS = ["<s>", "</s>", "<|user|>"]
WORDS = ["Hello", "world", "again", "water", "yes", "no", "end"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _vocabulary(pieces: list[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(dict.fromkeys([*SPECIALS, "<unk>", *pieces]))}


def _words(decoder: Any, pieces: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(_vocabulary(pieces), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        tokenizer.decoder = decoder
    return _wrap(tokenizer)


def byte_level(decoder: Any = None) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen, with added tokens that take the spaces beside them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoder or decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    bpe.add_tokens(
        [
            AddedToken("<tool call>", lstrip=True, normalized=False),
            AddedToken("é日", rstrip=True, normalized=False),
            AddedToken("  ", normalized=False),
        ]
    )
    return _wrap(bpe)


def byte_fallback(*, strips: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral 7B, or, without a stripped space, as Gemma."""
    pieces = [*BYTES, "▁", *string.ascii_letters, *string.digits, *".,:;!?'\"()[]{}<>/|-_", "▁▁", "日"]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "▁"
        for letter in word:
            merges.append((left, letter))
            pieces.append(left := left + letter)
    bpe = Tokenizer(
        models.BPE(_vocabulary(pieces), list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if strips else "never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return _wrap(bpe)


def unigram(**options: Any) -> PreTrainedTokenizerFast:
    """As T5 and XLNet: spaces are letters, and the first one is left out."""
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in SPECIALS)]
    pieces += [("▁" + word, -1.0) for word in WORDS] + [(letter, -5.0) for letter in "▁abcdehlorstwy.,日👩‍"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    tokenizer.decoder = decoders.Metaspace(**options)
    return _wrap(tokenizer)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, nothing stripped": lambda: byte_fallback(strips=False),
    "unigram": unigram,
    "unigram, nothing stripped": lambda: unigram(prepend_scheme="never"),
    "word pieces": lambda: _words(
        decoders.WordPiece(cleanup=True), [*WORDS, "##s", "##ing", ".", ",", "'", "n't", "do", "日", "##本"]
    ),
    "word pieces, not cleaned": lambda: _words(
        decoders.WordPiece(prefix="@@", cleanup=False), [*WORDS, "@@s", "@@ing", ".", "'s"]
    ),
    "word ends": lambda: _words(decoders.BPEDecoder(), ["a", "b</w>", "c</w>", ".</w>", "wat", "er</w>"]),
    "repeats are one": lambda: _words(
        decoders.CTC(pad_token="<pad>", cleanup=True), ["<pad>", "|", *"abcde.,'"]
    ),
    "no decoder": lambda: _words(None, WORDS),
    "letters": lambda: _words(decoders.Fuse(), [*"abc .,\n日本語", "👩", "‍", "👧"]),
    "letters, stripped": lambda: _words(decoders.Strip("_", 1, 1), ["_a", "b_", "__c__", "__", "d"]),
    "joined, stripped": lambda: _words(
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]), [" ", "  ", "a", " b", "c "]
    ),
    "joined, spaces made one": lambda: _words(
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(" +"), " ")]), [" ", "  ", "a", " b", "c "]
    ),
    "joined, pairs replaced": lambda: _words(
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")]), ["a", "b", "c", "ab", " "]
    ),
    "byte level, stripped": lambda: byte_level(
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    ),
    "bytes, in Python": ByT5Tokenizer,
}
"""Name -> how one is made."""
