"""What an answer may be: response formats as masks over a model's vocabulary, computed by llguidance.

None of it runs without bound. llguidance counts the work of compiling a grammar and of each token's mask, and
gives up: of a dozen formats made to be costly, with a vocabulary of 150,000, the worst took 0.3 s to compile
and 0.04 s for a token, one core.
"""

import contextlib
import json
import re
import threading

import llguidance.numpy
import numpy as np
import torch

from penstock.conversation import ResponseFormat

T = TypeVar("T")

_STACK_BYTES: Final = 256 << 20
"""Of a thread that compiles a format: llguidance follows definitions by recursion, some 7 KB a level, and a
schema of 64 KiB has up to 5,000. Only what is used of it takes memory, until the thread ends."""
_sizing_stacks = threading.Lock()

# Not verbose: the parser's state would be quoted, and with it the answer.
_LIMITS: Final = LLParserLimits(verbose_errors=False)
# As `json.dumps` writes. Free white space is refused: a model that likes it never comes to an end.
_SPACING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_WORD_BITS: Final = 32
_MOST_PROBLEM_CHARACTERS: Final = 240
_ANY_OBJECT: Final[dict[str, object]] = {"type": "object"}
_TOO_COMPLEX: Final = "it is too complex (\\g<0>): ask for fewer or shorter repetitions, or a simpler schema"
# Its complaints, and what they mean to whoever wrote the format. Those that name a keyword or a place in a
# pattern are clear as they are.
_WORDS: Final = (
    (
        "coerce_one_of",
        "oneOf whose alternatives may match together cannot be enforced: use anyOf, or tell them apart by a"
        " required property with another const in each",
    ),
    (
        r"Unimplemented keys: \[(.*)\]",
        r"Unimplemented keys: \1; nothing enforces them, leave them out and check the answer",
    ),
    ("forced bytes", "the model's tokenizer has other letters for a part of it"),
    ("NoExtension(Bias)?", "nothing matches it that the model's tokens can say"),
    (
        "lookarounds not supported.*",
        "look-around, word boundaries, and anchors inside a pattern are not supported",
    ),
    (
        "(integer|number) range: min=.*",
        r"bounds of an \1 have to lie within -2^63 and 2^63 - 1, the lower one first",
    ),
    (
        r"Resource '(.*)' is not present.*",
        r"the schema does not fetch others: \1 is none of its own definitions; put it in $defs",
    ),
    ("Pointer '(.*)' does not exist", r"the schema has no definition #\1 that its $ref names"),
    (
        "precomputation failed|(?i:fuel|too (?:big|large|complex|many|deep)|exceed|limit|stack overflow)",
        _TOO_COMPLEX,
    ),
)
_UNTYPED: Final = "\U0010fffe"
"""Stands before names of special tokens. No character, so nobody types it."""
_PLACE: Final = re.compile(r"^(?:at )?\d+\(\d+\): ")  # in the grammar that is made of the format


class Grammars:
    """Compiles response formats for one model; safe to use from many threads.

    Args:
        tokenizer: of the model.
        n_vocab: tokens that the model knows.
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
            raise InvalidFormatError(_problem(matcher))
        return Grammar(tokenizer, matcher, is_json=is_json)

    def token_bytes(self, token: int) -> bytes | None:
        """Return what a token stands for, maybe not whole characters; None if the tokenizer does not tell."""
        try:
            return self._tokenizer().decode_bytes([token]).removeprefix(_UNTYPED.encode())
        except InvalidFormatError:
            return None

    def _tokenizer(self) -> LLTokenizer:
        # The trie of its tokens takes up to a second, and most models are never asked for a format.
        with self._opening:
            if self._ours is None:
                self._ours = self._open()
            return self._ours

    def _open(self) -> LLTokenizer:
        with contextlib.suppress(Exception):  # it knows two kinds of tokenizers, which are most
            n_vocab = max(self._n_vocab, len(self._hf))  # the wider one, often the model
            return LLTokenizer(_rename_special(self._hf), n_vocab=n_vocab, eos_token=self._end_ids)
        try:
            n_vocab = max(self._n_vocab, len(self._hf))
            tokens = _Tokens(self._hf, self._end_ids)
            return LLTokenizer(TokenizerWrapper(tokens), n_vocab=n_vocab, eos_token=self._end_ids)
        except Exception as error:  # noqa: BLE001  whatever a tokenizer of its own raises
            problem = " ".join(str(error).split())[:_MOST_PROBLEM_CHARACTERS]
            raise InvalidFormatError(f"the model's tokenizer takes no formats: {problem}") from None


def _rename_special(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a fast tokenizer as JSON in which no text is a special token.

    Where only one text may follow, llguidance has its tokens from the tokenizer, which takes the name of a
    special token for that token; a format means the letters. Added tokens in angle brackets are special to
    llguidance, whatever they say of themselves.
    """
    backend = copy(cast(Any, tokenizer).backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    state: dict[str, Any] = json.loads(backend.to_str())
    names = {}
    for one in state["added_tokens"]:
        name = one["content"]
        if one["special"] or (name.startswith("<") and name.endswith(">")):
            one["content"] = names[name] = _UNTYPED + name
            one["special"] = True
    model = state["model"]
    if isinstance(vocab := model["vocab"], dict):
        model["vocab"] = {names.get(name, name): i for name, i in vocab.items()}
    else:
        model["vocab"] = [[names.get(name, name), *rest] for name, *rest in vocab]
    if (unknown := model.get("unk_token")) in names:
        model["unk_token"] = names[unknown]
    return json.dumps(state)


class _Tokens:
    """A tokenizer as llguidance takes any: what each token says behind another.

    Raises:
        ValueError: what tokens say depends on their neighbours.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        reads = Detokenizer(tokenizer)
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        said = [reads.bytes_of(token) for token in range(len(tokenizer))]
        if None in said:
            raise ValueError("what its tokens say depends on their neighbours")
        self.eos_token_id, self.bos_token_id = end_ids[0], None
        self.tokens = [special[i].encode() if i in special else text or b"" for i, text in enumerate(said)]
        self.special_token_ids = sorted(special)
        self._ids = {text: i for i, text in enumerate(said) if text}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Return tokens that say this, as far as there are any."""
        found, at = [], 0
        while ends := [end for end in range(at + self._longest, at, -1) if text[at:end] in self._ids]:
            found.append(self._ids[text[at : ends[0]]])
            at = min(ends[0], len(text))
        return found


class Grammar:
    """Where an answer is in its format. The one that was compiled stays at the beginning."""

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
        """Go on by a token that was allowed.

        Raises:
            InvalidFormatError: the format turned out to be too complex, or to have no end from here.
        """
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise InvalidFormatError(_problem(self._matcher))

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
        logits: shape (n_rows, vocab).
        grammars: of the rows, all of one model.

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
    """Do it in a thread that has room for any recursion: where a stack is too small, the process ends."""
    done: Future[T] = Future()

    def carry_out() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001  the caller's matter
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


def _problem(matcher: LLMatcher) -> str:
    """Return what llguidance says is wrong: one line, in words of the format that the caller wrote."""
    lines = matcher.get_error().splitlines()
    told = next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
    told = _PLACE.sub("", told)
    for pattern, words in _WORDS:
        if found := re.search(pattern, told):
            told = found.expand(words)
            break
    return told[:_MOST_PROBLEM_CHARACTERS]
