"""Turn a conversation into the tokens of a prompt: by the model's chat template, or in a plain format."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from transformers import PreTrainedTokenizerBase

from penstock.conversation import Message, Tool, parse_arguments
from penstock.errors import InvalidOptionError, InvalidTextError, ModelLoadError, PenstockError
from penstock_workers.generation.chat_templates import ALL_ROLES, Shape, find_losses
from penstock_workers.generation.thinking import ReasoningMarks

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
GAP: Final = "\n...\n"
"""Stands for what was cut out of a text."""
_LEAST_TOKENS = 32


class Chat:
    """The chat format of one model. Safe to use from many threads.

    What a template can do is found out by rendering: most ignore in silence what they do not know.

    Attributes:
        stop: strings that end an answer in this format.
        marks: marks around the model's reasoning.
        takes_tools: True if the template shows tools to the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
        """Find out what the template can.

        Args:
            tokenizer: the model's tokenizer, which has the template.
            name: name of the model.

        Raises:
            ModelLoadError: it cannot be rendered, or leaves out what users write.
        """
        self._tokenizer = tokenizer
        self._has_parts = False
        try:
            if tokenizer.chat_template:
                self._template = tokenizer.get_chat_template()
                # Some models have one of their own for tools.
                self._tool_template = tokenizer.get_chat_template(tools=[cast(dict[str, Any], _TOOL)])
            else:
                self._template = self._tool_template = _begin(tokenizer) + _PLAIN_TEMPLATE
            self.stop: tuple[str, ...] = () if tokenizer.chat_template else (_PLAIN_STOP,)
            lost = self._choose_form()
            question = [Message(role="user", content=_SENTINEL)]
            self._try(question)
            # Also the first call of the tokenizer, which drops a padding or truncation that its file asks
            # for: done later, by one of many threads, it would fail the others ("Already borrowed").
            self._tokenize(question, None, {})
        except Exception as error:  # whatever a template's code raises
            told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelLoadError(name, f"its chat template refuses a question: {told}") from error
        if lost[Shape()]:
            raise ModelLoadError(name, "its chat template leaves out what a user writes")
        self._ends_texts = _ends_texts(tokenizer)
        user = {"role": "user", "content": "."}
        self.marks = ReasoningMarks(tokenizer, self._template)
        self._switch = next((name for name in _SWITCHES if self._knows(name)), None)
        self.takes_tools = _SENTINEL in self._render([user], tools=[_TOOL])
        lost_beside_tools = lost
        if self.takes_tools:
            lost_beside_tools = find_losses(lambda turns: self._render(turns, tools=[_TOOL]))
            self.takes_tools = not lost_beside_tools[Shape()]
        self._lost = {False: lost, True: lost_beside_tools}  # by whether there are tools
        # Arguments are objects to most, to some the text of one.
        kinds: tuple[object, ...] = ({}, "{}")
        forms = [arguments for arguments in kinds if self._shows_calls(user, arguments)]
        self._takes_calls, self._has_text_arguments = bool(forms), forms[:1] == ["{}"]

    def _choose_form(self) -> Mapping[Shape, frozenset[str]]:
        """Choose texts or lists of parts, whichever loses less in the template; return what that loses."""
        as_texts = find_losses(self._render)
        if not any(as_texts.values()):
            return as_texts
        self._has_parts = True
        as_parts = find_losses(self._render)

        def rank(lost: Mapping[Shape, frozenset[str]]) -> tuple[bool, int]:
            return bool(lost[Shape()]), sum(map(len, lost.values()))

        if rank(as_parts) < rank(as_texts):
            return as_parts
        self._has_parts = False
        return as_texts

    def encode(
        self,
        turns: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """Return the tokens of a prompt that the model goes on with as the assistant.

        What users typed stays text, also where it reads like one of the model's control tokens.

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
        turns = self._reach_prompt(turns, has_tools=bool(tools))
        try:
            ids = self._tokenize(turns, tools, switches)
        except PenstockError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a template's code raises
            variables: dict[str, Any] = {"tools": tools} if tools else {}
            if isinstance(error, ValueError) and self._render([self._turn(t) for t in turns], **variables):
                raise InvalidTextError(
                    len(turns) - 1,
                    "or one before it holds a control token of the model that cannot stay text",
                ) from None
            # Its own words may quote the conversation.
            raise InvalidOptionError(
                "history", f"{len(turns)} turns", "the model's chat template takes no such order of roles"
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
        """Cut about `n_tokens` tokens out of the middle of a text; return None if it has too few.

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

    def _reach_prompt(self, turns: Sequence[Message], *, has_tools: bool) -> Sequence[Message]:
        """Return turns that the template brings into the prompt; what the system says may go to the user.

        Raises:
            InvalidOptionError: it leaves some out.
        """
        lost = self._lost[has_tools]
        shape = Shape(any(turn.role == "system" for turn in turns), len(_talk(turns)) > 1)
        if "system" in lost[shape]:
            turns = _fold_system(turns)
            shape = Shape(has_system=False, has_history=len(_talk(turns)) > 1)
        if lost[shape] and lost[shape] != ALL_ROLES:  # what is refused may be taken in another order
            raise InvalidOptionError(
                "history", f"{len(turns)} turns", "the model's chat template leaves out earlier turns"
            )
        return turns

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
        fields = self._form(turn.model_dump(exclude_none=True))
        for call in fields.get("tool_calls", ()):
            arguments = parse_arguments(call)
            as_text = json.dumps(arguments, ensure_ascii=False)
            call["function"]["arguments"] = as_text if self._has_text_arguments else arguments
            call.setdefault("type", "function")
        return fields

    def _form(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        content = turn.get("content")
        if not self._has_parts or not isinstance(content, str):
            return dict(turn)
        return {**turn, "content": [{"type": "text", "text": content}]}

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
        try:
            return self._try(turns, **variables)
        except Exception:  # noqa: BLE001  whatever a template's code raises
            return ""

    def _try(self, turns: Sequence[Mapping[str, Any] | Message], **variables: Any) -> str:
        """Return the text of a prompt, or raise what the template does."""
        text = self._tokenizer.apply_chat_template(
            [self._turn(turn) if isinstance(turn, Message) else self._form(turn) for turn in turns],
            chat_template=self._tool_template if variables.get("tools") else self._template,
            add_generation_prompt=True,
            tokenize=False,
            **variables,
        )
        return str(text)


def _talk(turns: Sequence[Message]) -> list[Message]:
    return [turn for turn in turns if turn.role != "system"]


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
