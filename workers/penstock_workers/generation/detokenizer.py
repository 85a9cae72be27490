"""Turn the tokens of an answer into text, while they come or all at once.

Most decoders write each token the same way wherever it stands, except at the beginning of a text: such a
token is a few bytes, looked up once. The others (word ends, spaces made one, repeated letters) decode a token
together with a window of tokens before it. Text that was returned is never changed, so the pieces of an
answer, however they are cut, add up to its text.
"""

import codecs
import functools
import json
import random
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # no more than a tokenizer's methods are used: tests have others, and load no torch
    from transformers import PreTrainedTokenizerBase

HALF_CHARACTER: Final = "\ufffd"
"""A decoder's sign for bytes that are no whole character, or not yet."""
_MOST_HALVES: Final = 3  # of a character of four bytes
_CONTEXT_TOKENS: Final = 8
_WINDOW_TOKENS: Final = 16
_MOST_TOKENS: Final = 4 * _WINDOW_TOKENS
_SAME_CHARACTERS: Final = 4
_UNSETTLED_CHARACTERS: Final = 8
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders that write a token alike wherever it stands, but at the beginning of a text.
_PLAIN_DECODERS: Final = {"Replace", "Metaspace", "WordPiece", "Strip", "ByteFallback", "Fuse"}
_N_SAMPLES, _SAMPLE_TOKENS = 8, 12
_SEEKS: Final = 4096


def _one_for_each_byte(error: UnicodeError) -> tuple[str, int]:
    # Source: sentencepiece's `DecodePieceIds`; llama.cpp and the byte fallback of tokenizers do so too.
    assert isinstance(error, UnicodeDecodeError)
    return HALF_CHARACTER * (error.end - error.start), error.end


codecs.register_error("penstock-each-byte", _one_for_each_byte)


class Detokenizer:
    """Decodes the tokens of one model; special tokens have no text. Safe to use from many threads.

    Bytes that are no character become U+FFFD: one for each byte where tokens are single bytes
    (`<0x0A>`), and what is whole around them stays; else as Python's `errors="replace"` has it.

    Attributes:
        errors: name of the handler that decodes bytes that are no character.
        n_unsettled: number of characters at the end of a text that the next token may change.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._known: dict[int, bytes | None] = {}
        steps = _decoders(tokenizer)
        kinds = [step["type"] for step in steps]
        self._letters = _byte_letters() if kinds == ["ByteLevel"] else None
        self.errors: Final = "replace" if self._letters else "penstock-each-byte"
        self._has_byte_tokens = "ByteFallback" in kinds or (not kinds and self._writes_bytes())
        # After `Fuse` all is one text: only what strips its beginning leaves the rest as it was.
        fused = steps[kinds.index("Fuse") + 1 :] if "Fuse" in kinds else []
        is_plain = set(kinds) <= _PLAIN_DECODERS
        is_plain &= all(step["type"] == "Strip" and (step["start"], step["stop"]) == (1, 0) for step in fused)
        self.n_unsettled: Final = max(
            (
                len(step["pattern"].get("String", "")) or _UNSETTLED_CHARACTERS
                for step in fused
                if "pattern" in step
            ),
            default=0,
        )
        self._anchor: int | None = None if self._letters else self._find_anchor()
        self._before = "" if self._anchor is None else self.text([self._anchor])
        self._is_plain = False
        self._is_plain = is_plain and self._is_right()

    def text(self, tokens: Sequence[int]) -> str:
        """Return what the tokenizer itself makes of tokens, special ones left out."""
        # Cleaning up spaces would change text, such as " ." in code.
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        try:
            return str(self._tokenizer.decode(list(tokens), **options))
        except BaseException as error:
            # Source: tokenizers' decoders/strip.rs fails where one character is to go from both ends.
            if type(error).__name__ != "PanicException":
                raise
            return ""

    def context(self, tokens: Sequence[int], *, must: bool = False) -> tuple[int, ...]:
        """Return the last tokens of a prompt that are text, for a text that goes on from it.

        Args:
            tokens: tokens of the prompt.
            must: return some token where the prompt has none, so that no space is dropped as a text's first.
        """
        found: list[int] = []
        for token in reversed(tokens):
            if token not in self._special:
                found.append(token)
            if len(found) == _CONTEXT_TOKENS:
                break
        anchor = () if self._anchor is None or not must else (self._anchor,)
        return tuple(reversed(found)) or anchor

    def begin(self, context: Sequence[int] = ()) -> "DecodeStream":
        """Return a stream that decodes behind a prompt's `context`; without, at the beginning of a text."""
        return DecodeStream(self, context)

    def bytes_of(self, token: int) -> bytes | None:
        """Return the bytes of a token behind any other token; None where these depend on its neighbours."""
        if token not in self._known:
            self._known[token] = self._find_bytes(token)
        return self._known[token]

    def first_bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token at the beginning of a text, where many decoders drop a space."""
        known = self.bytes_of(token) or b""
        is_plain = self._is_plain and not _BYTE_TOKEN.fullmatch(self._name(token) or "")
        return self.text([token]).encode() if is_plain else known

    def text_behind_another(self, token: int) -> str:
        """Return the text of a token behind some other token."""
        if self._anchor is None:
            return self.text([token])
        return self.text([self._anchor, token]).removeprefix(self._before)

    def _find_bytes(self, token: int) -> bytes | None:
        if token in self._special:
            return b""
        if (name := self._name(token)) is None:
            return b""
        if self._letters is not None:
            # A token with a letter that is no byte, such as an added one, is itself.
            found = [self._letters.get(letter) for letter in name]
            return name.encode() if None in found else bytes(byte for byte in found if byte is not None)
        if self._has_byte_tokens and (byte := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        return self.text_behind_another(token).encode() if self._is_plain else None

    def _name(self, token: int) -> str | None:
        # Models may be wider than their tokenizers.
        name = self._tokenizer.convert_ids_to_tokens([token])[0]
        return None if name is None else str(name)

    def _writes_bytes(self) -> bool:
        token = self._tokenizer.convert_tokens_to_ids("<0x41>")
        return isinstance(token, int) and self.text([token]) == "A"

    def _find_anchor(self) -> int | None:
        """Return a token that is a word or letter, to decode others behind."""
        for token in range(min(len(self._tokenizer), _SEEKS)):
            name = None if token in self._special else self._name(token)
            if name is None or _BYTE_TOKEN.fullmatch(name):
                continue
            if (text := self.text([token])).isalnum() and self.text([token, token]).startswith(text):
                return token
        return None

    def _is_right(self) -> bool:
        """Try whether tokens decoded together give the text that they give one by one."""
        if self._anchor is None:
            return False
        self._is_plain = True
        draw = random.Random(0)  # noqa: S311  samples, no secrets
        n_vocab = len(self._tokenizer)
        for _ in range(_N_SAMPLES):
            tokens = [draw.randrange(n_vocab) for _ in range(_SAMPLE_TOKENS)]
            tokens = [t for t in tokens if not _BYTE_TOKEN.fullmatch(self._name(t) or "<0x00>")]
            said = b"".join(self.bytes_of(token) or b"" for token in tokens).decode()
            if self.text([self._anchor, *tokens]) != self._before + said:
                self._known.clear()
                return False
        return True


class DecodeStream:
    """Decodes one answer while its tokens come. Made by `Detokenizer.begin`."""

    def __init__(self, detokenizer: Detokenizer, context: Sequence[int]) -> None:
        self._detokenizer = detokenizer
        self._is_first = not context
        self._bytes = codecs.getincrementaldecoder("utf-8")(detokenizer.errors)
        # The last tokens, for those whose text depends on their neighbours; and their text that was returned,
        # which is all but what may yet become a character.
        self._window = list(context)
        self._returned, self._held = detokenizer.text(context) if context else "", ""
        self._deferred: list[int] = []

    def add(self, tokens: Iterable[int]) -> str:
        """Add tokens; return their text, in whole characters."""
        return "".join(map(self._add, tokens))

    def defer(self, token: int) -> None:
        """Add a token that is decoded by `end`: many at once are decoded faster."""
        self._deferred.append(token)

    def restart(self) -> "DecodeStream":
        """Return a stream that decodes at the beginning of a text."""
        return self._detokenizer.begin()

    def end(self) -> str:
        """Return the rest of the text: what is no whole character is U+FFFD."""
        deferred, self._deferred = self._deferred, []
        return self.add(deferred) + self._bytes.decode(b"", final=True) + self._release_held()

    def _add(self, token: int) -> str:
        said = self._detokenizer.bytes_of(token)
        if said is None:
            return self._bytes.decode(b"", final=True) + self._decode_in_window(token)
        if not said:
            return ""
        if self._is_first:
            self._is_first = False
            said = self._detokenizer.first_bytes_of(token)
            self._window = [
                *self._detokenizer.context((), must=True)
            ]  # what comes next is no longer the first
            self._returned = self._detokenizer.text(self._window)
        return self._release_held() + self._bytes.decode(said)

    def _release_held(self) -> str:
        held, self._held = self._held, ""
        self._returned += held
        return held

    def _decode_in_window(self, token: int) -> str:
        """Return what a token adds to the text of those before it."""
        self._window.append(token)
        text = self._detokenizer.text(self._window)
        n_halves = min(len(text) - len(text.rstrip(HALF_CHARACTER)), _MOST_HALVES)
        whole = text[: max(0, len(text) - max(n_halves, self._detokenizer.n_unsettled))]
        new, returned = "", self._returned
        if text.startswith(returned):
            new = whole[len(returned) :]
            self._returned, self._held = returned + new, text[len(returned) + len(new) :]
        elif returned.startswith(text):
            self._held = ""  # the new text is shorter: returned text cannot be taken back, and may come again
        else:
            n_same = _n_common(whole, returned)
            if len(returned) - n_same > _SAME_CHARACTERS:  # the window does not help: decode without it
                self._window, n_same = [token], 0
                text = whole = self._detokenizer.text_behind_another(token)
            new = whole[n_same:]
            self._returned, self._held = text[: n_same + len(new)], text[n_same + len(new) :]
        if len(self._window) >= 2 * _WINDOW_TOKENS:
            new += self._shorten(text)
        return new

    def _shorten(self, text: str) -> str:
        """Drop the oldest tokens of the window, where the text of the others stays the same without them."""
        for n_tokens in range(_CONTEXT_TOKENS, _WINDOW_TOKENS + 1):
            tail = self._detokenizer.text(self._window[-n_tokens:])
            n_returned = len(tail) - len(self._held)
            if n_returned > 0 and text.endswith(tail[-max(_SAME_CHARACTERS, len(self._held) + 1) :]):
                self._window = self._window[-n_tokens:]
                self._returned = tail[:n_returned]
                return ""
        if len(self._window) < _MOST_TOKENS:
            return ""
        held = self._release_held()
        self._window = self._window[-1:]
        self._returned = self._detokenizer.text(self._window)
        return held


def _n_common(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _decoders(tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    """Return the steps in which tokens become text; none where the tokenizer does not tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return []
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state.get("decoders", [state])
    return steps


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Return the letters of byte-level tokenizers, and the bytes they stand for."""
    # Source: `bytes_to_unicode` of GPT-2; bytes that are no visible letter of Latin-1 come from U+0100 on.
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
