import re
from pathlib import Path

import pytest

import penstock

ROOT = Path(__file__).parents[2]
FOLDERS = ("producer", "workers")

pytestmark = pytest.mark.skipif(not (ROOT / "producer").is_dir(), reason="tests a wheel: no source folders")


def modules() -> list[Path]:
    """Return our modules, relative to the repository."""
    return [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_source_folders_are_no_packages() -> None:
    """`import producer` would work by accident and make a second copy of every module."""
    assert [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()] == []


def test_modules_are_named_after_what_they_know() -> None:
    """There is no drawer for the rest."""
    drawers = re.compile(r"_?(utils?|helpers?|common|misc|tools?)")

    assert [
        str(path) for path in modules() if any(drawers.fullmatch(part) for part in (*path.parts, path.stem))
    ] == []


def test_folders_are_at_most_two_deep() -> None:
    """Nobody digs for code; folders that hold data only are not counted."""
    assert [str(path) for path in modules() if len(path.parent.parts) > 3] == []


def test_keys_of_delivery_are_told_once() -> None:
    """The scripts' head and docs/delivery.md have the same table, and no script touches another key."""
    script = (ROOT / "producer" / "penstock" / "delivery.lua").read_text()
    rows = re.findall(r"^(?:-- )?(\|.*\|)$", script, flags=re.MULTILINE)
    names = set(re.findall(r"'(penstock:[a-z:]+|unacked\w*)'", script))

    assert len(rows) > 10
    assert "\n".join(rows) in (ROOT / "docs" / "delivery.md").read_text()
    assert [name for name in names if f"| `{name}" not in "\n".join(rows)] == []


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
