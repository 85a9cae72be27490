"""A model's tokenizer in the form that llguidance takes."""

import contextlib
import json
from collections.abc import Sequence
from copy import copy
from typing import Any, Final, cast

from llguidance import LLTokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from penstock.errors import InvalidFormatError
from penstock_workers.generation.detokenizer import Detokenizer
from penstock_workers.generation.format_problems import MAX_PROBLEM_CHARACTERS

UNTYPED: Final = "\U0010fffe"
"""Stands before names of special tokens. No character, so nobody types it."""


def open_tokenizer(tokenizer: PreTrainedTokenizerBase, n_vocab: int, end_ids: list[int]) -> LLTokenizer:
    """Return llguidance's tokenizer for a model's.

    Args:
        tokenizer: the model's tokenizer.
        n_vocab: number of tokens that the model knows.
        end_ids: tokens that end its answers.

    Raises:
        InvalidFormatError: llguidance cannot use it.
    """
    with contextlib.suppress(Exception):  # llguidance knows two kinds of tokenizers, which are most
        n_tokens = max(n_vocab, len(tokenizer))  # the wider one, often the model
        return LLTokenizer(_rename_special(tokenizer), n_vocab=n_tokens, eos_token=end_ids)
    try:
        n_tokens = max(n_vocab, len(tokenizer))
        tokens = _Tokens(tokenizer, end_ids)
        return LLTokenizer(TokenizerWrapper(tokens), n_vocab=n_tokens, eos_token=end_ids)
    except Exception as error:  # noqa: BLE001  whatever a tokenizer of its own raises
        problem = " ".join(str(error).split())[:MAX_PROBLEM_CHARACTERS]
        raise InvalidFormatError(f"the model's tokenizer takes no formats: {problem}") from None


def _rename_special(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a fast tokenizer as JSON in which no text is a special token.

    Where only one text may follow, llguidance asks the tokenizer for its tokens. A tokenizer takes the name
    of a special token for that token, but a format means the letters. llguidance takes each added token in
    angle brackets for a special one, whatever its entry says.
    """
    backend = copy(cast(Any, tokenizer).backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    state: dict[str, Any] = json.loads(backend.to_str())
    names = {}
    for one in state["added_tokens"]:
        name = one["content"]
        if one["special"] or (name.startswith("<") and name.endswith(">")):
            one["content"] = names[name] = UNTYPED + name
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
    """Any tokenizer in the form that llguidance takes: the bytes of each token behind another one.

    Raises:
        ValueError: the bytes of a token depend on its neighbours.
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
        """Return the tokens of a text, up to the first bytes that no token has."""
        found, at = [], 0
        while ends := [end for end in range(at + self._longest, at, -1) if text[at:end] in self._ids]:
            found.append(self._ids[text[at : ends[0]]])
            at = min(ends[0], len(text))
        return found
