"""One answer while its tokens arrive: when it ends, and what it says."""

from collections.abc import Callable

from penstock.errors import IncompleteOutputError
from penstock.result import FinishReason
from penstock_workers.batching.feed import Answer
from penstock_workers.generation.generation_config import ForbiddenTokens
from penstock_workers.generation.prompt import Prompt
from penstock_workers.generation.sequence import TokenSequence
from penstock_workers.generation.thinking import ReasoningParser
from penstock_workers.generation.vocabulary import Vocabulary


class Answering:
    """Makes an answer of the tokens of one prompt.

    Args:
        vocabulary: the model's tokens.
        prompt: what is answered.
        forbidden: tokens that the model's own configuration forbids.
        on_piece: called with each new piece of text.

    Attributes:
        tokens: prompt and output; the batch appends to it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: Prompt,
        forbidden: ForbiddenTokens | None,
        on_piece: Callable[[str], None] | None,
    ) -> None:
        self._grammar = prompt.grammar and prompt.grammar.begin()
        self.tokens = TokenSequence(
            sampling=prompt.sampling,
            prompt=prompt.ids,
            grammar=self._grammar,
            forbidden=forbidden,
            n_top_logprobs=prompt.n_top_logprobs,
        )
        self._vocabulary, self._prompt = vocabulary, prompt
        self._parser = ReasoningParser(
            vocabulary.detokenizer,
            vocabulary.marks,
            prompt.stage,
            prompt.stop.strings,
            on_piece,
            context=prompt.context,
            is_exact=self._grammar is not None,
            is_framed=prompt.is_chat,
        )
        self._choose_grammar()

    def take(self, token: int) -> Answer | None:
        """Take the newest token of the output; return the answer if that ends it.

        Raises:
            IncompleteOutputError: the limit ends it, or the model while it still thinks, and its format does
                not end there.
            InvalidFormatError: its format is too complex to go on.
        """
        n_tokens = len(self.tokens.output)
        if self._grammar and self._parser.stage == "either" and token != self._vocabulary.marks.open_id:
            self._parser.skip_reasoning()
        is_text = self._parser.stage != "reasoning"
        if self._grammar and self._parser.stage == "text":
            self._grammar.take(token)
        if self._vocabulary.ends(token) or (is_text and token in self._prompt.stop.token_ids):
            return self._answer(self._parser.end(is_cut_off=False), "stop", n_tokens - 1)
        if (text := self._parse(token)) is not None:
            return self._answer(text, "stop", n_tokens)
        if self._grammar and self._grammar.is_over:
            return self._answer(self._parser.end(is_cut_off=False), "stop", n_tokens)
        if n_tokens == self._prompt.max_new_tokens:
            return self._answer(self._parser.end(is_cut_off=True), "length", n_tokens)
        self._choose_grammar()
        return None

    def _parse(self, token: int) -> str | None:
        """Give a token to the parser; return the whole text if a stop string is now complete."""
        if self._vocabulary.shows(token):
            return self._parser.add(token)
        name = self._prompt.stop.marks.get(token)
        return None if name is None else self._parser.add_mark(name)

    def _choose_grammar(self) -> None:
        """Let the next token follow the format, if it belongs to the text."""
        self.tokens.grammar = self._grammar if self._parser.stage == "text" else None
        if self._grammar and self._parser.stage == "either":
            self.tokens.grammar = self._grammar.beside(self._vocabulary.marks.open_id)

    def _answer(self, text: str, finish_reason: FinishReason, n_tokens: int) -> Answer:
        if self._grammar:
            if not self._grammar.is_complete:
                raise IncompleteOutputError(n_tokens, text)
            self._grammar.check(text)
        self._parser.flush(text)
        return Answer(
            text=text,
            finish_reason=finish_reason,
            n_tokens=n_tokens,
            reasoning=self._parser.reasoning,
            tool_calls=self._vocabulary.tool_calls(self._prompt, self.tokens.output),
            logprobs=self._vocabulary.logprobs(self.tokens, n_tokens),
        )
