"""How a conversation becomes the tokens of a prompt: the model's chat template, or a plain format."""

from collections.abc import Sequence
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from penstock.errors import InvalidOptionError, InvalidTextError
from penstock.request import Message

# For models without a template: "System: ...\n\nUser: ...\n\nAssistant: ...\n\nUser: ...\n\nAssistant:".
_PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_PLAIN_STOP = "\nUser:"
_SENTINEL = "penstock-probe"


class Chat:
    """The chat format of one model. Safe to use from many threads.

    Attributes:
        stop: strings that end an answer in this format.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        if tokenizer.chat_template:
            self._template = tokenizer.get_chat_template()
        else:
            self._template = _begin(tokenizer) + _PLAIN_TEMPLATE
        self.stop: tuple[str, ...] = () if tokenizer.chat_template else (_PLAIN_STOP,)
        # Also the first call of the tokenizer, which drops a padding or truncation that its file asks
        # for: done later, by one of many threads, it would fail the others ("Already borrowed").
        self._tokenize([Message(role="user", content=_SENTINEL)])
        self._folds_system = not self._shows_system()

    def encode(self, turns: Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt that the model goes on with as the assistant.

        What a caller typed stays text, also where it reads like one of the model's control tokens.

        Raises:
            InvalidOptionError: the template does not take these roles in this order.
            InvalidTextError: a control token was typed that the tokenizer cannot take for text, or
                the template leaves nothing of the conversation.
        """
        try:
            ids = self._tokenize(_fold_system(turns) if self._folds_system else turns)
        except TemplateError:
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

    def _tokenize(self, turns: Sequence[Message]) -> list[int]:
        # Contents without control tokens give the same ids as without `sanitize_control_tokens`. A
        # transformers too old for it would take it for a variable of the template, and stay silent.
        ids = self._tokenizer.apply_chat_template(
            [turn.model_dump() for turn in turns],
            chat_template=self._template,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_dict=False,
        )
        return cast(list[int], ids)  # its type depends on the options

    def _shows_system(self) -> bool:
        """Say whether a system turn reaches the prompt: templates refuse the role, or drop it in silence."""
        turns = [{"role": "system", "content": _SENTINEL}, {"role": "user", "content": "."}]
        try:
            text = self._tokenizer.apply_chat_template(turns, chat_template=self._template, tokenize=False)
        except TemplateError:
            return False
        return _SENTINEL in text


def _begin(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template's start: the token that this tokenizer puts before every text, if it does."""
    ids = tokenizer("a")["input_ids"]
    return "{{ bos_token }}" if tokenizer.bos_token and ids[:1] == [tokenizer.bos_token_id] else ""


def _fold_system(turns: Sequence[Message]) -> list[Message]:
    """Put what the system turns say before the first user turn."""
    said = [turn.content for turn in turns if turn.role == "system"]
    folded = [turn for turn in turns if turn.role != "system"]
    first = next(index for index, turn in enumerate(folded) if turn.role == "user")
    folded[first] = Message(role="user", content="\n\n".join([*said, folded[first].content]))
    return folded
