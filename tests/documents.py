"""The documentation as tests read it: pages, links, headings, blocks of code."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
_FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<kind>\S*)\n(?P<text>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A block of code.

    Attributes:
        kind: language, "" for what is typed into a shell.
        text: lines between the fences.
        reason: why it is not run, as the page says; "" for one that is.
        line: number of its first line in the page.
    """

    kind: str
    text: str
    reason: str
    line: int


def name(page: Path) -> str:
    """Return how a page is called in a test's name."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, kind: str) -> Iterator[Block]:
    """Yield a page's blocks of one language."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        if found["kind"] == kind:
            line = text.count("\n", 0, found.start("text")) + 1
            yield Block(kind, found["text"], found["reason"] or "", line)


def commands(page: Path) -> Iterator[str]:
    """Yield the lines of a page's shell blocks that call `penstock`, without where it is installed."""
    for block in blocks(page, ""):
        for line in block.text.splitlines():
            if found := re.match(r"(?:\S+=\S+ )*(?:\.venv/bin/)?penstock (?P<rest>.*)", line):
                # Two commands may stand beside each other, three spaces apart.
                yield from (part for part in re.split(r"\s{3,}penstock ", found["rest"]) if part)


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as where the repository is browsed."""
    prose = _FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", prose, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, anchor) of each link that leads to a file."""
    prose = _FENCE.sub("", page.read_text())
    yield from re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]*))?\)", prose)
