"""What a caller writes is in the prompt, or the model does not load, or the caller is told."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from penstock.errors import InvalidOptionError, ModelLoadError
from penstock.request import GenerateRequest
from penstock_workers.generation.generator import Generator
from penstock_workers.settings import ModelSettings
from tests.models.odd_models import change_json
from tests.models.test_generation import (
    ALTERNATES,
    CPU,
    DROPS_SYSTEM,
    NO_SYSTEM,
    TEMPLATE,
    load,
    make_folder,
    make_tokenizer,
    one_thread,
    request,
    text_of,
)

__all__ = ["one_thread"]

HEAD, TAIL = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}",
    "<|end|>{% endfor %}<|assistant|>",
)
PARTS = (
    HEAD
    + "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    + TAIL
)
FIRST_PART = HEAD + "{{ m['content'][0]['text'] | default('') }}" + TAIL
EITHER = HEAD + (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}"
    "{% endfor %}{% endif %}" + TAIL
)
PARTS_BUT_SYSTEM = PARTS.replace(
    "{% for c in m['content'] %}",
    "{% if m['role'] == 'system' %}{{ m['content'] }}{% else %}{% for c in m['content'] %}",
).replace(TAIL, "{% endif %}" + TAIL)
UPPER = TEMPLATE.replace("| trim", "| trim | upper")
LAST_ONLY = "{{ bos_token }}{{ messages[-1]['content'] }}<|assistant|>"
LAST_FOUR = TEMPLATE.replace("in messages %}", "in messages[-4:] %}", 1)
LAST_AND_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + ("{{ messages[-1]['content'] }}<|assistant|>")
)
SYSTEM_WITHOUT_HISTORY = TEMPLATE.replace(
    "for m in messages", "for m in messages if m.role != 'system' or messages | length < 3"
)
HISTORY = [{"role": "user", "content": "FIRST"}, {"role": "assistant", "content": "SECOND"}]


def prompt_text(generator: Generator, prompt: str = "QUESTION\n\nEND", **fields: object) -> str:
    """Return the text of a prompt."""
    return text_of(generator, generator.prepare(request(prompt, **fields)))


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        NO_SYSTEM,
        DROPS_SYSTEM,
        ALTERNATES,
        PARTS,
        FIRST_PART,
        EITHER,
        PARTS_BUT_SYSTEM,
        UPPER,
        SYSTEM_WITHOUT_HISTORY,
        None,
    ],
)
def test_what_is_written_is_in_the_prompt(template: str | None, tmp_path: Path) -> None:
    """Text, system prompt and history, whether templates take texts or lists of parts, or drop a role."""
    generator = load(make_folder(tmp_path, template=template))

    for history in ([], HISTORY, HISTORY * 4):
        for system in (None, "SYSTEM"):
            text = prompt_text(generator, history=history, system_prompt=system)
            assert "QUESTION" in text
            assert "END" in text
            assert text.count("FIRST") == text.count("SECOND") == len(history) // 2
            assert text.count("SYSTEM") == (system is not None)


def test_dropped_turns_are_refused(tmp_path: Path) -> None:
    """A template without a past serves questions, and says so to whoever sends one."""
    for number, template in enumerate((LAST_ONLY, LAST_FOUR, LAST_AND_SYSTEM)):
        generator = load(make_folder(tmp_path / str(number), template=template))
        assert "QUESTION" in prompt_text(generator)
        assert "SYSTEM" in prompt_text(generator, system_prompt="SYSTEM")
        with pytest.raises(InvalidOptionError, match="chat template leaves out earlier turns"):
            prompt_text(generator, history=HISTORY * 4)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[1].content | upper }}" + TEMPLATE, "UndefinedError: list object has no element 1"),
        (TEMPLATE.replace("| trim", ".split('###')[1] | string"), "leaves out what a user writes"),
        (TEMPLATE.replace("| trim", "[:20]"), "leaves out what a user writes"),
        (TEMPLATE.replace("| trim", ".split('\n')[0]"), "leaves out what a user writes"),
        ("{{ bos_token }}Hello!", "leaves out what a user writes"),
        ("{{ raise_exception('not for you') }}", "not for you"),
        ("{{ unknown_function() }}", "'unknown_function' is undefined"),
        ("{{ messages | nope }}", "No filter named 'nope'"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{% trans %}a{% endtrans %}", "TemplateSyntaxError"),
        ("{% include 'other' %}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.index('~') }}", "ValueError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ documents[0].text }}{{ messages[0].content }}", "UndefinedError"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_at_load(
    template: str, reason: str, tmp_path: Path
) -> None:
    """One line with the template's own reason."""
    folder = make_folder(tmp_path, template=template)

    with pytest.raises(ModelLoadError, match=reason) as refused:
        load(folder)

    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "raising", ["{{ 1 // 0 }}", "{{ m.content.index('~') }}", "{{ m.content.nope.nope }}"]
)
def test_an_odd_conversation_is_its_callers_error(raising: str, tmp_path: Path) -> None:
    """Where a template stumbles over some conversations, whoever sends one is told."""
    template = TEMPLATE.replace("{{ '<|'", "{% if m.content == 'odd' %}" + raising + "{% endif %}{{ '<|'")
    generator = load(make_folder(tmp_path, template=template))

    assert "even" in prompt_text(generator, "even")
    with pytest.raises(InvalidOptionError, match="takes no such order of roles"):
        prompt_text(generator, "odd")


def named(folder: Path, names: tuple[str, ...]) -> None:
    """Several templates, as older tokenizers hold them."""
    make_tokenizer(None).save_pretrained(folder)
    templates = [{"name": name, "template": f"{name}: {TEMPLATE}"} for name in names]
    change_json(folder / "tokenizer_config.json", chat_template=templates)


def sidecar(folder: Path) -> None:
    """The file of a processor."""
    make_tokenizer(None).save_pretrained(folder)
    change_json(folder / "chat_template.json", chat_template="sidecar: " + TEMPLATE)


def files(folder: Path) -> None:
    """One file for each template."""
    make_tokenizer(None).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("jinja: " + TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("rag: " + TEMPLATE)


def additional(folder: Path) -> None:
    """Files beside a template that is in the tokenizer's configuration."""
    make_tokenizer(None).save_pretrained(folder)
    change_json(folder / "tokenizer_config.json", chat_template="own: " + TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("rag: " + TEMPLATE)


def write_file(folder: Path) -> str:
    """A template of the operator's."""
    file = folder / "mine.jinja"
    file.write_text("mine: " + TEMPLATE)
    return str(file)


@pytest.mark.parametrize(
    ("write", "chosen", "begins"),
    [
        (sidecar, None, "sidecar: "),
        (files, None, "jinja: "),
        (files, "rag", "rag: "),
        (additional, None, "own: "),
        (additional, "rag", "rag: "),
        (lambda folder: named(folder, ("default", "tool_use")), None, "default: "),
        (lambda folder: named(folder, ("default", "tool_use")), "tool_use", "tool_use: "),
        (lambda folder: named(folder, ("rag", "tool_use")), "rag", "rag: "),
        (lambda folder: named(folder, ("rag",)), None, "rag: "),
        (sidecar, "FILE", "mine: "),
        (Path.resolve, "FILE", "mine: "),
    ],
)
def test_templates_are_found_wherever_they_are(
    write: Callable[[Path], object], chosen: str | None, begins: str, tmp_path: Path
) -> None:
    """In the tokenizer, in files beside it, by name, or in a file that the settings name."""
    folder = make_folder(tmp_path / "model", template=None)
    write(folder)
    settings = {"task": "generate", "source": str(folder)}
    if chosen is not None:
        settings["chat_template"] = write_file(tmp_path) if chosen == "FILE" else chosen

    generator = Generator.load("chat", ModelSettings.model_validate(settings), CPU)

    assert prompt_text(generator).startswith(f"{begins}<|begin|>")


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (None, "none of its chat templates is the default; chat_template names one: rag, tool_use"),
        ("nope", r"'nope' is no file that can be read \(FileNotFoundError\), nor one of.*: rag, tool_use"),
    ],
)
def test_a_choice_has_to_be_made(chosen: str | None, reason: str, tmp_path: Path) -> None:
    """Of several templates without a default the settings choose one, and the line says which there are."""
    named(make_folder(tmp_path, template=None), ("rag", "tool_use"))
    settings = {"task": "generate", "source": str(tmp_path), "chat_template": chosen}

    with pytest.raises(ModelLoadError, match=reason):
        Generator.load("chat", ModelSettings.model_validate(settings), CPU)


def test_no_template_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The plain format is used, with one warning."""
    generator = load(make_folder(tmp_path, template=None))

    assert "User: QUESTION" in prompt_text(generator)
    assert len([line for line in caplog.messages if "has no chat template" in line]) == 1


def test_calls_reach_templates_of_parts(tmp_path: Path) -> None:
    """Answers of tools are contents, too."""
    template = PARTS.replace(TAIL, "{{ m.tool_calls | default('') }}" + TAIL).replace(
        "{{ bos_token }}", "{{ bos_token }}{{ tools | default('') | tojson }}"
    )
    generator = load(make_folder(tmp_path, template=template))
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "FIRST"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "RAIN", "tool_call_id": "call00001"},
    ]
    wanted = {"model": "chat", "history": history, "tools": [tool], "prompt": None}

    text = text_of(generator, generator.prepare(GenerateRequest.parse(wanted)))

    assert "RAIN" in text
    assert "FIRST" in text
    assert "weather" in text


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "embed", "source": "bundled:minilm"},
        {"task": "generate", "engine": "remote", "source": "https://host/v1"},
    ],
)
def test_templates_are_for_generation(fields: dict[str, str]) -> None:
    """The setting is refused where it would do nothing."""
    with pytest.raises(ValidationError, match="for generation models that workers compute"):
        ModelSettings.model_validate(fields | {"chat_template": "rag"})
