from pathlib import Path

import pytest

from penstock.errors import WorkerError
from penstock_workers.command.demo import MAX_CHARACTERS, Passage, cut_markdown, passages

SENTENCE = "A job that was sent is never lost by anyone."


def test_passages_stand_under_their_heading() -> None:
    """Each passage says where it comes from."""
    markdown = (
        f"# Queues\n\n{SENTENCE}\n\n## Leases\nIt is renewed while\nthe worker is alive.\n\n{SENTENCE}\n"
    )

    assert list(cut_markdown(markdown)) == [
        f"Queues: {SENTENCE}",
        "Leases: It is renewed while the worker is alive.",
        f"Leases: {SENTENCE}",
    ]


def test_items_and_rows_are_passages() -> None:
    """A list or a table is cut into its entries, its rules left out."""
    markdown = (
        f"# Words\n- {SENTENCE}\n- Short.\n- {SENTENCE} Twice.\n\n"
        f"| word | what it means here |\n| --- | --- |\n| job | {SENTENCE} |\n"
    )

    assert list(cut_markdown(markdown)) == [
        f"Words: {SENTENCE}",
        f"Words: {SENTENCE} Twice.",
        f"Words: job | {SENTENCE}",
    ]


def test_long_paragraphs_are_cut() -> None:
    """No passage's text is longer than the limit, and none of it is lost."""
    words = " ".join(f"word{n}" for n in range(400))

    cut = [passage.removeprefix("Long: ") for passage in cut_markdown(f"# Long\n\n{words}\n")]

    assert all(len(text) <= MAX_CHARACTERS for text in cut)
    assert "".join(cut) == words


@pytest.mark.parametrize(
    "markdown", ["", "\n\n\n", "# Only a heading\n", "short\n", "|---|---|\n", "#\n\n##\n", "- \n- "]
)
def test_nothing_worth_embedding_gives_no_passage(markdown: str) -> None:
    """Headings, rules and scraps are no passages."""
    assert list(cut_markdown(markdown)) == []


def test_text_before_the_first_heading_is_kept() -> None:
    """A file without headings is searched too."""
    assert [passage.endswith(SENTENCE) for passage in cut_markdown(SENTENCE)] == [True]


def test_folder_is_read_without_hidden_files(tmp_path: Path) -> None:
    """Files come in a fixed order, named by their place in the folder."""
    for name in ("b.md", "a/c.md", ".venv/hidden.md", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# Heading\n\n{SENTENCE} Größe.\n", encoding="utf-8")

    text = f"Heading: {SENTENCE} Größe."
    assert passages(tmp_path) == [Passage(file="a/c.md", text=text), Passage(file="b.md", text=text)]


def test_folder_without_markdown_is_told(tmp_path: Path) -> None:
    """There is nothing to search."""
    with pytest.raises(WorkerError, match="no Markdown files in"):
        passages(tmp_path)
