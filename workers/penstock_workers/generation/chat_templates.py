"""Find a model's chat template, and what it leaves out of a conversation."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from penstock.errors import ModelLoadError
from penstock_workers.checkpoint.source import read_json
from penstock_workers.settings import ModelSettings

logger = logging.getLogger(__name__)

Templates = str | dict[str, str]
Render = Callable[[Sequence[Mapping[str, Any]]], str]

_DEFAULT: Final = "default"
_SIDECARS: Final = ("chat_template.json", "processor_config.json")
"""Files with the templates of models that also take pictures; their tokenizers have none."""
_FILLER: Final = "The wheel turns, and the water falls.\n" * 40
_N_ROUNDS: Final = 3


def choose_template(
    name: str, source: str, model: ModelSettings, tokenizer: PreTrainedTokenizerBase
) -> Templates | None:
    """Return a model's template, several by name with a default among them, or None if it has none.

    Raises:
        ModelLoadError: none of several is the default and the settings name none, or name what is not there.
    """
    found = _read_templates(source, model.revision, tokenizer)
    names = ", ".join(sorted(found)) or "none"
    if (chosen := model.chat_template) is not None:
        if chosen in found:
            return found[chosen]
        file = Path(chosen).expanduser()
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelLoadError(
                name,
                f"chat_template {chosen!r} is no file that can be read ({type(error).__name__}),"
                f" nor one of its templates: {names}",
            ) from None
    if not found:
        logger.warning(
            "model %s has no chat template: chats are written in a plain format (User: ... Assistant: ...);"
            " its settings' chat_template names a file with another",
            name,
        )
        return None
    if _DEFAULT in found:
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    raise ModelLoadError(name, f"none of its chat templates is the default; chat_template names one: {names}")


def _read_templates(source: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    found = _by_name(tokenizer.chat_template)
    if _DEFAULT not in found:  # files of named templates hide the tokenizer's own
        file = read_json(source, "tokenizer_config.json", revision) or {}
        found = _by_name(file.get("chat_template")) | found
    for sidecar in _SIDECARS:
        if not found:
            file = read_json(source, sidecar, revision) or {}
            found = _by_name(file.get("chat_template"))
    return found


def _by_name(templates: object) -> dict[str, str]:
    if isinstance(templates, dict):
        return {str(name): str(template) for name, template in templates.items()}
    if isinstance(templates, list | tuple):
        return {str(one["name"]): str(one["template"]) for one in templates}
    return {_DEFAULT: templates} if isinstance(templates, str) and templates else {}


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of conversation, as far as templates make a difference."""

    has_system: bool = False
    has_history: bool = False


SHAPES: Final = tuple(Shape(system, history) for system in (False, True) for history in (False, True))
ALL_ROLES: Final = frozenset(("system", "user", "assistant"))


def find_losses(render: Render) -> dict[Shape, frozenset[str]]:
    """Return whose words a template leaves out of the prompt, by kind of conversation.

    Each turn has a word at its beginning and one at its end, which have to be found in the prompt. A template
    that refuses a conversation leaves out all of it.
    """
    return {shape: _find_lost(render, shape) for shape in SHAPES}


def _find_lost(render: Render, shape: Shape) -> frozenset[str]:
    roles = ["system"] * shape.has_system + ["user", "assistant"] * (_N_ROUNDS * shape.has_history) + ["user"]
    marks = [(f"penstock{place}begins", f"penstock{place}ends") for place in range(len(roles))]
    turns = [
        {"role": role, "content": f"{begin}\n{_FILLER}{end}"}
        for role, (begin, end) in zip(roles, marks, strict=True)
    ]
    text = render(turns).casefold()
    if not text:
        return ALL_ROLES
    return frozenset(
        role for role, both in zip(roles, marks, strict=True) if not all(mark in text for mark in both)
    )
