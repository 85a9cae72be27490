"""How a conversation becomes the tokens of a prompt: the model's chat template, or a plain format."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from penstock.errors import InvalidOptionError, InvalidTextError
from penstock.request import Message, Tool, parse_arguments
from penstock_workers.engines.thinking import CLOSE

# For models without a template: "System: ...\n\nUser: ...\n\nAssistant: ...\n\nUser: ...\n\nAssistant:".
_PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_PLAIN_STOP = "\nUser:"
_SENTINEL = "penstock-probe"
_CALL, _RESULT = "penstock-call", "penstock-result"
_CALL_ID = "penstock1"  # Mistral's templates take nothing but nine letters and digits
_SWITCHES = ("enable_thinking", "thinking")
_TOOL: Tool = {
    "type": "function",
    "function": {"name": _SENTINEL, "description": ".", "parameters": {"type": "object", "properties": {}}},
}
_REFUSALS = (TemplateError, TypeError, KeyError)  # a template adds what cannot be added, or looks for more
GAP: Final = "\n...\n"
"""Stands for what was cut out of a text."""
_LEAST_TOKENS = 32


class Chat:
    """The chat format of one model. Safe to use from many threads.

    What a template can is found by rendering: most ignore in silence what they do not know.

    Attributes:
        stop: strings that end an answer in this format.
        marks_thinking: whether reasoning stands between marks.
        takes_tools: whether the template shows tools to the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        if tokenizer.chat_template:
            self._template = tokenizer.get_chat_template()
            # Some models have one of their own for tools.
            self._tool_template = tokenizer.get_chat_template(tools=[cast(dict[str, Any], _TOOL)])
        else:
            self._template = self._tool_template = _begin(tokenizer) + _PLAIN_TEMPLATE
        self.stop: tuple[str, ...] = () if tokenizer.chat_template else (_PLAIN_STOP,)
        # Also the first call of the tokenizer, which drops a padding or truncation that its file asks
        # for: done later, by one of many threads, it would fail the others ("Already borrowed").
        self._tokenize([Message(role="user", content=_SENTINEL)], None, {})
        self._ends_texts = _ends_texts(tokenizer)
        user = {"role": "user", "content": "."}
        self._folds_system = _SENTINEL not in self._render([{"role": "system", "content": _SENTINEL}, user])
        self.marks_thinking = CLOSE in self._template
        self._switch = next((name for name in _SWITCHES if self._knows(name)), None)
        self.takes_tools = _SENTINEL in self._render([user], tools=[_TOOL])
        # Arguments are objects to most, to some the text of one.
        kinds: tuple[object, ...] = ({}, "{}")
        forms = [arguments for arguments in kinds if self._shows_calls(user, arguments)]
        self._takes_calls, self._has_text_arguments = bool(forms), forms[:1] == ["{}"]

    def encode(
        self,
        turns: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """Return the tokens of a prompt that the model goes on with as the assistant.

        What a caller typed stays text, also where it reads like one of the model's control tokens.

        Raises:
            InvalidOptionError: the template does not take these roles in this order, or has no place for
                tools, calls or a switch.
            InvalidTextError: a control token was typed that the tokenizer cannot take for text, or
                the template leaves nothing of the conversation.
        """
        if tools and not self.takes_tools:
            raise InvalidOptionError("tools", "set", "the model's chat template has no place for them")
        if not self._takes_calls and any(turn.role == "tool" or turn.tool_calls for turn in turns):
            raise InvalidOptionError(
                "history", "with calls", "the model's chat template has no place for them"
            )
        switches = {} if enable_thinking is None else {self.find_switch(enable_thinking): enable_thinking}
        try:
            ids = self._tokenize(_fold_system(turns) if self._folds_system else turns, tools, switches)
        except _REFUSALS:
            # Its own words may quote the conversation.
            raise InvalidOptionError(
                "history", f"{len(turns)} turns", "the model's chat template takes no such order of roles"
            ) from None
        except ValueError:
            raise InvalidTextError(
                len(turns) - 1, "or one before it holds a control token of the model that cannot stay text"
            ) from None
        if not ids:
            raise InvalidTextError(len(turns) - 1, "leaves no tokens")
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text that the model goes on with, as its tokenizer makes them.

        Raises:
            InvalidTextError: it leaves no tokens.
        """
        ids = cast(list[int], self._tokenizer(text, verbose=False)["input_ids"])
        ids = ids[:-1] if self._ends_texts else ids
        if not ids:
            raise InvalidTextError(0, "leaves no tokens")
        return ids

    def find_switch(self, wanted: bool) -> str:
        """Return the template's variable that switches thinking on and off.

        Raises:
            InvalidOptionError: it has none.
        """
        if self._switch is None:
            raise InvalidOptionError(
                "enable_thinking", str(wanted).lower(), "the model's chat template has no such switch"
            )
        return self._switch

    def cut_middle(self, text: str, n_tokens: int) -> str | None:
        """Return a text with about so many tokens less, cut out of its middle; None if it has but a few.

        Raises:
            InvalidOptionError: the tokenizer does not say where its tokens are in a text.
        """
        if not self._tokenizer.is_fast:
            allowed = "the model's tokenizer does not say where its tokens are"
            raise InvalidOptionError("truncation", "middle", allowed)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = cast(list[tuple[int, int]], encoded["offset_mapping"])
        n_kept = max(_LEAST_TOKENS, len(places) - n_tokens - self.n_tokens(GAP))
        if n_kept + self.n_tokens(GAP) >= len(places):
            return None
        head = places[n_kept // 2 - 1][1]
        tail = max(head, places[n_kept // 2 - n_kept][0])
        return text[:head] + GAP + text[tail:]

    def n_tokens(self, text: str) -> int:
        """Return how many tokens a text has by itself."""
        return len(
            cast(list[int], self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        )

    def _tokenize(
        self, turns: Sequence[Message], tools: Sequence[Tool] | None, switches: Mapping[str, bool]
    ) -> list[int]:
        # Contents without control tokens give the same ids as without `sanitize_control_tokens`. A
        # transformers too old for it would take it for a variable of the template, and stay silent.
        ids = self._tokenizer.apply_chat_template(
            [self._turn(turn) for turn in turns],
            tools=[cast(dict[Any, Any], tool) for tool in tools] if tools else None,
            chat_template=self._tool_template if tools else self._template,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_dict=False,
            **cast(dict[str, Any], switches),
        )
        return cast(list[int], ids)  # its type depends on the options

    def _turn(self, turn: Message) -> dict[str, Any]:
        """Return a turn as templates know it."""
        fields = turn.model_dump(exclude_none=True)
        for call in fields.get("tool_calls", ()):
            arguments = parse_arguments(call)
            as_text = json.dumps(arguments, ensure_ascii=False)
            call["function"]["arguments"] = as_text if self._has_text_arguments else arguments
            call.setdefault("type", "function")
        return fields

    def _shows_calls(self, user: Mapping[str, str], arguments: object) -> bool:
        """Say whether a call and its answer reach the prompt."""
        call = {"id": _CALL_ID, "type": "function", "function": {"name": _CALL, "arguments": arguments}}
        asked = {"role": "assistant", "content": "", "tool_calls": [call]}
        answered = {"role": "tool", "content": _RESULT, "tool_call_id": _CALL_ID, "name": _CALL}
        text = self._render([user, asked, answered])
        return _CALL in text and _RESULT in text

    def _knows(self, switch: str) -> bool:
        turns = [{"role": "user", "content": "."}]
        return self._render(turns, **{switch: True}) != self._render(turns, **{switch: False})

    def _render(self, turns: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Return the text of a prompt, empty where the template refuses."""
        template = self._tool_template if variables.get("tools") else self._template
        try:
            text = self._tokenizer.apply_chat_template(
                cast(list[dict[str, str]], turns),
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
                **variables,
            )
        except _REFUSALS:
            return ""
        return str(text)


def _ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a tokenizer puts an end token behind each text: nothing goes on from there."""
    ids = cast(list[int], tokenizer("a")["input_ids"])
    return tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]


def _begin(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template's start: the token that this tokenizer puts before every text, if it does."""
    ids = tokenizer("a")["input_ids"]
    return "{{ bos_token }}" if tokenizer.bos_token and ids[:1] == [tokenizer.bos_token_id] else ""


def _fold_system(turns: Sequence[Message]) -> list[Message]:
    """Put what the system turns say before the first user turn."""
    said = [turn.content for turn in turns if turn.role == "system"]
    folded = [turn for turn in turns if turn.role != "system"]
    first = next((index for index, turn in enumerate(folded) if turn.role == "user"), None)
    if first is None:
        return [Message(role="user", content="\n\n".join(said)), *folded] if said else folded
    folded[first] = Message(role="user", content="\n\n".join([*said, folded[first].content]))
    return folded
