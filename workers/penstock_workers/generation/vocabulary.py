"""What the tokens of one model mean in an answer: text, marks, ends, calls of tools."""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any
from uuid import uuid4

import numpy as np
from transformers import PreTrainedTokenizerBase

from penstock.conversation import ToolCall
from penstock.result import Logprobs
from penstock_workers.generation.detokenizer import Detokenizer
from penstock_workers.generation.grammar import Grammars
from penstock_workers.generation.prompt import Prompt
from penstock_workers.generation.sequence import TokenSequence
from penstock_workers.generation.thinking import ReasoningMarks

logger = logging.getLogger(__name__)


class Vocabulary:
    """The tokens of one model. Safe to use from many threads.

    Args:
        name: name of the model, for logs.
        tokenizer: the model's tokenizer.
        marks: marks around its reasoning.
        n_vocab: number of tokens that the model knows.
        end_ids: tokens that end its answers.

    Attributes:
        marks: marks around its reasoning.
        grammars: compiles formats for these tokens.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        marks: ReasoningMarks,
        n_vocab: int,
        end_ids: frozenset[int],
    ) -> None:
        self._name, self._tokenizer, self.marks, self._end_ids = name, tokenizer, marks, end_ids
        self.grammars = Grammars(tokenizer, n_vocab, end_ids)
        self._hidden = {
            i: str(token)
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special and i not in marks.ids
        }

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """The decoder of these tokens."""
        return Detokenizer(self._tokenizer)

    def ends(self, token: int) -> bool:
        """Say whether a token ends the model's answers."""
        return token in self._end_ids

    def shows(self, token: int) -> bool:
        """Say whether a token is text, or a mark of reasoning."""
        return token not in self._hidden

    def stop_marks(self, stop: Sequence[str]) -> dict[int, str]:
        """Return the names of tokens that are no text but occur in a stop string."""
        if not stop:
            return {}
        return {i: name for i, name in self._hidden.items() if any(name in string for string in stop)}

    def logprobs(self, tokens: TokenSequence, n_tokens: int) -> Logprobs | None:
        """Return log-probabilities of an answer's first tokens; None if nobody asked for them."""
        if tokens.n_top_logprobs is None:
            return None
        noted, width = tokens.logprobs[:n_tokens], 1 + tokens.n_top_logprobs
        ids = np.array([ids for ids, _ in noted], dtype=np.int32).reshape(-1, width)
        values = np.array([values for _, values in noted], dtype=np.float32).reshape(-1, width)
        # A character for each byte: JSON has no bytes, and most tokens stay readable so.
        texts = {str(i): self._bytes_of(i).decode("latin-1") for i in np.unique(ids).tolist()}
        return Logprobs(ids=ids, values=values, tokens=texts)

    def tool_calls(self, prompt: Prompt, tokens: list[int]) -> Sequence[ToolCall] | None:
        """Read the calls out of an answer; None if it has none, or the tokenizer cannot read them."""
        if not prompt.tools or getattr(self._tokenizer, "response_template", None) is None:
            return None
        try:
            said = self._tokenizer.parse_response(tokens, prefix=list(prompt.ids), tools=list(prompt.tools))  # type: ignore[arg-type]  # plain dicts
            calls = [_own_call(call) for call in said.get("tool_calls") or ()]
        except Exception as error:  # noqa: BLE001  a foreign rule meets whatever a model writes
            logger.info("no calls could be read", extra={"model": self._name, "reason": type(error).__name__})
            return None
        return calls or None

    def _bytes_of(self, token: int) -> bytes:
        if self.shows(token) and (known := self.grammars.token_bytes(token)) is not None:
            return known
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()


def _own_call(call: Mapping[str, Any]) -> ToolCall:
    """Return a call as transformers reads it, in OpenAI's form."""
    function = call["function"]
    arguments = function.get("arguments") or {}
    return {
        # Nine letters and digits: Mistral's templates take nothing else when it comes back.
        "id": uuid4().hex[:9],
        "type": "function",
        "function": {
            "name": str(function["name"]),
            "arguments": arguments
            if isinstance(arguments, str)
            else json.dumps(arguments, ensure_ascii=False),
        },
    }
