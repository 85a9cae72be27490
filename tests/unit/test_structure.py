import re
from fnmatch import fnmatchcase

import pytest

import penstock
from tests import structure
from tests.structure import FOLDERS, ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "producer").is_dir(), reason="tests a wheel: no source folders")


def test_source_folders_are_no_packages() -> None:
    """`import producer` would work by accident and make a second copy of every module."""
    assert [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()] == []


def test_modules_are_named_after_what_they_know() -> None:
    """There is no drawer for the rest."""
    drawers = re.compile(r"_?(utils?|helpers?|common|misc|tools?)")
    names = [(path, path.with_suffix("").parts) for path in structure.modules(".py")]

    assert [str(path) for path, parts in names if any(map(drawers.fullmatch, parts))] == []


def test_folders_are_at_most_two_deep() -> None:
    """Nobody digs for code; folders that hold data only are not counted."""
    assert [str(path) for path in structure.modules(".py") if len(path.parent.parts) > 3] == []


LIMITS = {
    "files": f"files over {structure.MAX_FILE_LINES} lines: split them by what they know",
    "functions": f"functions whose bodies are over {structure.MAX_BODY_LINES} lines: name their parts",
    "methods": f"classes with over {structure.MAX_METHODS} methods: they do more than one thing",
    "attributes": f"classes with over {structure.MAX_ATTRIBUTES} attributes: they hold more than one thing",
    "docstrings": "lines under `Attributes:` that begin with a word of `LEANING`: write what stands alone",
}


def test_exceptions_are_exceptions() -> None:
    """Whoever mends something takes it off the list, so that nobody undoes it."""
    lines = structure.EXCEPTIONS.read_text().splitlines()

    assert list(structure.shrunk(lines, structure.over_limits())) == lines, "run `python -m tests.structure`"


@pytest.mark.parametrize("limit", LIMITS)
def test_limits_are_kept(limit: str) -> None:
    """What is over a limit is on the list in `tests/structure.toml`, which only shrinks."""
    allowed = structure.exceptions()[limit]
    over = structure.over_limits()[limit]

    found = {name: n for name, n in over.items() if name not in allowed or n > (allowed[name] or n)}

    assert found == {}, f"{LIMITS[limit]}; what is renamed takes its entry in tests/structure.toml along"


@pytest.mark.parametrize("limit", LIMITS)
def test_excuses_are_used(limit: str) -> None:
    """Nothing is excused that needs no excuse; the list is sorted, so that entries are found and merged."""
    listed = list(structure.exceptions()[limit])

    assert listed == sorted(listed)
    assert structure.EXCUSED[limit].keys() - structure.measured()[limit].keys() == set()


def scripts() -> dict[str, str]:
    """Return the Lua files, parts too, by name."""
    return {path.stem: path.read_text() for path in (ROOT / "producer" / "penstock" / "lua").glob("*.lua")}


def keys_in_scripts() -> set[str]:
    """Return the keys that scripts write out; names that end in a colon begin keys."""
    literal = re.compile(r"'(penstock:[a-z:]+|unacked\w*)'")
    return {name for text in scripts().values() for name in literal.findall(text)}


def test_scripts_touch_no_key_that_is_not_told() -> None:
    """docs/reference/keys.md has a row for each key that stands in a script."""
    told = (ROOT / "docs" / "reference" / "keys.md").read_text()

    assert len(keys_in_scripts()) > 10
    assert [name for name in keys_in_scripts() if f"\n| `{name}" not in told] == []


def test_workers_have_a_right_to_every_key() -> None:
    """configs/users.acl lets a worker use each key and channel of scripts and of `penstock.keys`."""
    users = (ROOT / "configs" / "users.acl").read_text()
    (rights,) = re.findall(r"^user worker (.*)", users, flags=re.MULTILINE)
    allowed = [right.lstrip("%RW~&") for right in rights.split() if re.match("(%[RW]+)?[~&]", right)]
    named = (ROOT / "producer" / "penstock" / "keys.py").read_text()
    names = keys_in_scripts() | set(re.findall(r"\"(penstock:[a-z:]+|celery-task-meta-)", named))

    assert len(names) > 20
    assert [
        name
        for name in sorted(names)
        if not any(fnmatchcase(each, right) for right in allowed for each in (name, f"{name}:any"))
    ] == []


def test_scripts_are_named_where_they_are_run() -> None:
    """A script's name is a string in Python: each file has one, and `script` is given no other."""
    code = "".join((ROOT / path).read_text() for path in structure.modules(".py"))
    names = {name for name in scripts() if not name.startswith("_")}

    assert [name for name in sorted(names) if f'"{name}"' not in code] == []
    assert set(re.findall(r"\bscript\(\"(\w+)\"", code)) - names == set()


def test_scripts_say_which_parts_they_use() -> None:
    """A function of a part that is missing would be an unknown name, once a server runs that line."""
    bodies = {name: re.sub(r"--.*", "", text) for name, text in scripts().items()}
    functions = {name: set(re.findall(r"local function (\w+)", body)) for name, body in bodies.items()}
    parts = [name for name in bodies if name.startswith("_")]
    missing = {
        name: {
            part
            for part in parts
            if f"{part}.lua" not in scripts()[name].partition("-- Uses ")[2].partition("\n")[0]
            and functions[part] & (set(re.findall(r"(?<![.:])\b(\w+)\(", body)) - functions[name])
        }
        for name, body in bodies.items()
        if name not in parts
    }

    assert {name: found for name, found in missing.items() if found} == {}


def test_scripts_say_what_they_are_given() -> None:
    """Each names its KEYS and ARGV before its first line of code, and fits on a few screens."""
    heads = {name: re.match(r"(?:#!.*\n)?((?:--.*\n)*)", text) for name, text in scripts().items()}

    assert [name for name, text in scripts().items() if text.count("\n") > 200] == []
    assert [
        name
        for name, head in heads.items()
        if head is None
        or not (name.startswith("_") or {"-- KEYS", "-- ARGV"} <= set(re.findall("-- [A-Z]{4}", head[1])))
    ] == []


def test_keys_are_named_in_one_module() -> None:
    """`penstock.keys` has every name of Penstock in Redis, and docs/reference/keys.md tells of each."""
    told = (ROOT / "docs" / "reference" / "keys.md").read_text()
    named = (ROOT / "producer" / "penstock" / "keys.py").read_text()
    literal = re.compile(r"\"(penstock:[a-z:]+|celery-task-meta-|_kombu\.\w+)")
    elsewhere = [
        f"{path}: {name}"
        for path in structure.modules(".py")
        if path.name != "keys.py"
        for name in literal.findall((ROOT / path).read_text())
    ]

    assert elsewhere == []
    assert [name for name in literal.findall(named) if f"`{name}" not in told] == []


def test_public_names_are_sorted() -> None:
    """Each name has one place in `__all__`, and exists."""
    assert penstock.__all__ == sorted(set(penstock.__all__))
    assert [name for name in penstock.__all__ if not hasattr(penstock, name)] == []


def test_public_names_have_their_types_checked() -> None:
    """A name is public when it is exported and has a line in `tests/typing/api.py`."""
    words = set(re.findall(r"\w+", (ROOT / "tests" / "typing" / "api.py").read_text()))

    assert [name for name in penstock.__all__ if name not in words] == []


def test_packages_are_typed() -> None:
    """Type checkers of those who install us read our types."""
    assert (ROOT / "producer" / "penstock" / "py.typed").exists()
    assert (ROOT / "workers" / "penstock_workers" / "py.typed").exists()
