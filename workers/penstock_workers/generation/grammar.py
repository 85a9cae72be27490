"""Response formats: masks over a model's vocabulary, computed by llguidance.

Nothing here runs without bound. llguidance counts the work of compiling a grammar and of each token's mask,
and then gives up: of a dozen formats made to be costly, with a vocabulary of 150,000, the worst took 0.3 s
to compile and 0.04 s for a token, one core.
"""

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Final, Self, TypeVar

import llguidance.numpy
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from penstock.conversation import ResponseFormat
from penstock.errors import InvalidFormatError
from penstock_workers.generation.format_problems import explain
from penstock_workers.generation.format_tokens import UNTYPED, open_tokenizer
from penstock_workers.generation.schemas import simplify

T = TypeVar("T")

_STACK_BYTES: Final = 256 << 20
"""Stack of a thread that compiles a format: llguidance follows definitions by recursion, some 7 KB a level,
and a schema of 64 KiB has up to 5,000 levels. Only what is used takes memory, until the thread ends."""
_sizing_stacks = threading.Lock()

# Not verbose: the parser's state would be quoted, and with it the answer.
_LIMITS: Final = LLParserLimits(verbose_errors=False)
# As `json.dumps` writes. Free white space is refused: a model that likes it never comes to an end.
_SPACING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_WORD_BITS: Final = 32
_ANY_OBJECT: Final[dict[str, object]] = {"type": "object"}


class Grammars:
    """Compiles response formats for one model; safe to use from many threads.

    Args:
        tokenizer: the model's tokenizer.
        n_vocab: number of tokens that the model knows.
        end_ids: tokens that end its answers; allowed exactly where the format may end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, n_vocab: int, end_ids: Iterable[int]) -> None:
        self._hf, self._end_ids = tokenizer, sorted(end_ids)
        self._n_vocab = n_vocab
        self._ours: LLTokenizer | None = None
        self._opening = threading.Lock()

    def compile(self, wanted: ResponseFormat) -> "Grammar | None":
        """Return the grammar of a format; None for `text`, which is any.

        Raises:
            InvalidFormatError: llguidance cannot read it, finds that nothing satisfies it or gives up, or
                cannot read the model's tokenizer.
        """
        if wanted["type"] == "text":
            return None
        is_json = wanted["type"].startswith("json")
        tokenizer = self._tokenizer()

        def build() -> LLMatcher:
            matcher = LLMatcher(tokenizer, _rules(wanted), log_level=0, limits=_LIMITS)
            matcher.compute_bitmask()  # where some dead ends show
            return matcher

        matcher = _on_a_deep_stack(build)
        if matcher.is_error():
            raise InvalidFormatError(explain(matcher))
        return Grammar(tokenizer, matcher, is_json=is_json)

    def token_bytes(self, token: int) -> bytes | None:
        """Return the bytes of a token, maybe not whole characters; None if the tokenizer does not tell."""
        try:
            return self._tokenizer().decode_bytes([token]).removeprefix(UNTYPED.encode())
        except InvalidFormatError:
            return None

    def _tokenizer(self) -> LLTokenizer:
        # The trie of its tokens takes up to a second, and most models are never asked for a format.
        with self._opening:
            if self._ours is None:
                self._ours = open_tokenizer(self._hf, self._n_vocab, self._end_ids)
            return self._ours


class Grammar:
    """The place of an answer in its format. The grammar that was compiled stays at the beginning."""

    def __init__(self, tokenizer: LLTokenizer, matcher: LLMatcher, *, is_json: bool) -> None:
        self._tokenizer, self._matcher, self._is_json = tokenizer, matcher, is_json
        self._also: int | None = None

    def begin(self) -> Self:
        """Return a copy for one answer."""
        return type(self)(self._tokenizer, self._matcher.deep_copy(), is_json=self._is_json)

    def beside(self, token: int | None) -> Self:
        """Return a copy that allows one token more."""
        copy = self.begin()
        copy._also = token
        return copy

    def fill(self, words: NDArray[np.int32], row: int) -> None:
        """Write the bits of the tokens that may come next into a row of `words`, shape (n_rows, n_words)."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, words, row)
        if self._also is not None:
            word, bit = divmod(self._also, _WORD_BITS)
            words.view(np.uint32)[row, word] |= np.uint32(1 << bit)

    @property
    def n_words(self) -> int:
        """Words of 32 tokens in a mask."""
        return -(-self._tokenizer.vocab_size // _WORD_BITS)

    def take(self, token: int) -> None:
        """Go on by one token, which was allowed.

        Raises:
            InvalidFormatError: the format turned out to be too complex, or to have no end from here.
        """
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise InvalidFormatError(explain(self._matcher))

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def check(self, text: str) -> None:
        """Read a whole answer again, as text: a decoder may show tokens otherwise than the grammar took them.

        Raises:
            ValueError: it does not follow the format.
        """
        if self._is_json:
            json.loads(text)
        reader = self._matcher.deep_copy()
        reader.reset()
        if not (reader.consume_tokens(self._tokenizer.greedy_tokenize(text)) and reader.is_accepting()):
            raise ValueError("the text does not follow its format")


def restrict(logits: Tensor, grammars: Sequence[Grammar]) -> Tensor:
    """Forbid what each row's grammar does not allow next.

    Args:
        logits: logits of any dtype, shape (n_rows, vocab).
        grammars: grammar of each row, all of one model.

    Returns:
        Dtype and shape of `logits`, with -inf for what is forbidden.
    """
    words = np.zeros((len(grammars), grammars[0].n_words), dtype=np.int32)
    for row, grammar in enumerate(grammars):
        grammar.fill(words, row)
    # The model's width counts: bits that are missing are 0.
    bits = np.unpackbits(words.astype("<i4").view("u1"), axis=1, count=logits.shape[-1], bitorder="little")
    return logits.masked_fill(torch.from_numpy(bits == 0).to(logits.device), -torch.inf)


def _on_a_deep_stack(work: Callable[[], T]) -> T:
    """Do `work` in a thread with room for any recursion: where a stack is too small, the process ends."""
    done: Future[T] = Future()

    def carry_out() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001  raised again by `result`
            done.set_exception(error)

    with _sizing_stacks:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=carry_out, name="compile-format", daemon=True).start()
        finally:
            threading.stack_size(before)
    return done.result()


def _rules(wanted: ResponseFormat) -> str:
    """Return a format in llguidance's language."""
    if wanted["type"] == "regex":
        return LLMatcher.grammar_from_regex(wanted["pattern"])
    if wanted["type"] == "choice":
        # One terminal, since a rule's alternatives are followed one by one.
        choices = " | ".join(map(_quote, wanted["choices"]))
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    schema = simplify(wanted["json_schema"]["schema"]) if wanted["type"] == "json_schema" else _ANY_OBJECT
    return LLMatcher.grammar_from_json_schema(json.dumps(schema | {"x-guidance": _SPACING}))


def _quote(choice: str) -> str:
    # Its lexer takes no delete character, which JSON does not escape.
    return json.dumps(choice, ensure_ascii=False).replace("\x7f", r"\u007f")
