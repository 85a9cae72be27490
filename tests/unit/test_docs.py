"""The documentation says what the code has."""

import inspect
import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from penstock.errors import error_classes
from penstock_workers.cli import cli
from penstock_workers.configuration import load_settings
from penstock_workers.settings import ModelSettings, Settings, TenantSettings
from tests.documents import PAGES, ROOT, blocks, commands, headings, links, name

RUN = [page for page in PAGES if page.name not in ("design.md", "CHANGELOG.md")]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Each link is to a file of the repository, each anchor to a heading of it."""
    wrong = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            wrong.append(f"{path}#{anchor}")

    assert wrong == []


def test_files_that_are_named_exist() -> None:
    """A file in backticks is one of the repository, by its path or the end of it."""
    foreign = ("celeryconfig.py", "flowerconfig.py", "first.py")
    folders = ("producer", "workers", "tests", "benchmarks", "examples", "tools")
    files = [f"/{name(file)}" for folder in folders for file in (ROOT / folder).rglob("*.*")]
    files += [f"/{file.name}" for file in ROOT.iterdir()]
    wrong = [
        f"{name(page)}: {named}"
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for named in re.findall(r"`([\w/]+\.(?:py|lua|c))`", page.read_text())
        if named not in foreign and not any(file.endswith(f"/{named}") for file in files)
    ]

    assert wrong == []


@pytest.mark.parametrize("page", RUN, ids=name)
def test_commands_exist(page: Path) -> None:
    """Each `penstock ...` in a block is a command with options that it has."""
    for line in commands(page):
        words, command = shlex.split(line, comments=True), cli
        context = click.Context(cli, **cli.context_settings)
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]
            context = click.Context(command, parent=context)
        command.make_parser(context).parse_args(words)


@pytest.mark.parametrize("page", [page for page in RUN if [*blocks(page, "toml")]], ids=name)
def test_configurations_load(page: Path, tmp_path: Path) -> None:
    """Each block of TOML is a deployment that would be taken."""
    for block in blocks(page, "toml"):
        file = tmp_path / f"{page.stem}-{block.line}.toml"
        file.write_text(block.text)
        load_settings(file, environ={})


@pytest.mark.parametrize("page", [page for page in RUN if "penstock up" in page.read_text()], ids=name)
def test_a_page_installs_what_it_starts(page: Path) -> None:
    """Where a page installs and then starts a deployment of its own, the extras bring all that this needs."""
    shell = "\n".join(block.text for block in blocks(page, ""))
    installed = re.search(r'pip install "\.\[([\w,-]+)\]"', shell)
    toml = "\n".join(block.text for block in blocks(page, "toml"))
    if installed is None or not toml:
        return

    needed = {"workers"} | ({"remote"} if 'engine = "remote"' in toml else set())
    needed |= set() if "broker_url" in toml else {"bundled"}

    assert needed <= set(installed[1].split(","))


def test_extras_are_installed_from_a_clone() -> None:
    """Neither a page nor an error advises the name on the package index, and the extras exist."""
    code = [
        file for folder in ("producer", "workers", "benchmarks") for file in (ROOT / folder).rglob("*.py")
    ]
    texts = {name(file): file.read_text() for file in (*PAGES, *code)}
    asked = re.compile(r"""how_to_install\(['"]([\w-]+)|pip install "?\.\[([\w,-]+)\]""")
    extras = {
        extra
        for text in texts.values()
        for found in asked.findall(text)
        for extra in "".join(found).split(",")
    }

    assert [file for file, text in texts.items() if "penstock[" in text] == []
    assert {"celery", "remote", "openvino", "llama-index"} <= extras
    if (ROOT / "pyproject.toml").exists():  # there is none where a wheel is tested
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extras <= project["optional-dependencies"].keys()


def test_every_setting_is_told() -> None:
    """The reference has a row for each key, with its default, and none besides."""
    rows = re.findall(
        r"^\| `([a-zA-Z_.0-9]+)` \| (\S+) \|", (ROOT / "docs/reference/configuration.md").read_text(), re.M
    )

    assert dict(rows) == dict(_keys(Settings))


def _keys(section: type[BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted key, default as the reference writes it) of a section's fields."""
    found: list[tuple[str, str]] = []
    for key, field in section.model_fields.items():
        if prefix == "" and key in ("models", "tenants"):
            found += _keys(ModelSettings if key == "models" else TenantSettings, f"{key}.NAME.")
            continue
        parts = [one for one in _classes(field.annotation) if issubclass(one, BaseModel)]
        if parts:
            found += _keys(parts[0], f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", _written(field.is_required(), field.default)))
    return found


def _classes(annotation: object) -> list[type]:
    inner = getattr(annotation, "__args__", (annotation,))
    return [one for one in inner if isinstance(one, type)]


def _written(is_required: bool, default: object) -> str:
    if is_required or default is None:
        return "required" if is_required else "none"
    if isinstance(default, tuple):
        return f"`{json.dumps(default)}`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def test_every_error_is_told() -> None:
    """The reference has each error, below its kind, with its fields and whether to try again."""
    rows = re.findall(
        r"^\| ([↳ ]*)`(\w+)` \|(.*?)\| .+ \|( yes| no|) \|$",
        (ROOT / "docs/reference/errors.md").read_text(),
        re.M,
    )
    told = {error: (fields, again.strip()) for _, error, fields, again in rows}
    depths = {error: len(arrows.split()) for arrows, error, _, _ in rows}

    # Those of adapters are there as well once a test has imported one.
    errors = [error for error in error_classes() if error.__module__ == "penstock.errors"]
    assert {error.__name__ for error in errors} == told.keys()
    for error in errors:
        fields, again = told[error.__name__]
        own = "__init__" in vars(error)
        names = [*inspect.signature(error).parameters] if own else []
        assert re.findall(r"`(\w+)`", fields) == names, error
        assert again in ("", "yes" if error.retryable else "no"), error
        assert depths[error.__name__] == max(0, len(error.__mro__) - 5), error


def test_the_journey_is_in_the_tree() -> None:
    """Each file that CONTRIBUTING leads to exists; one that was moved is named here."""
    files = re.findall(r"`((?:producer|workers)/[\w/]+\.\w+)`", (ROOT / "CONTRIBUTING.md").read_text())

    assert len(files) >= 12
    assert [file for file in files if not (ROOT / file).is_file()] == []
