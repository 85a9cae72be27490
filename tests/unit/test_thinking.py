"""Reasoning told from text, whatever tokens the marks are made of."""

from typing import Any

import pytest

from penstock_workers.batching.feed import Thought
from penstock_workers.generation.detokenizer import Detokenizer
from penstock_workers.generation.thinking import ReasoningMarks, ReasoningParser, Stage


class Mark(str):
    """An added token."""

    __slots__ = ()
    special = False


class Letters:
    """A tokenizer of letters; two tokens are marks."""

    added_tokens_decoder: dict[int, Mark] = {  # noqa: RUF012  as transformers has it
        1: Mark("<think>"),
        2: Mark("</think>"),
    }

    def __len__(self) -> int:
        return 128

    def decode(self, ids: list[int], **_: Any) -> str:
        """Return the text of tokens."""
        return "".join(self.convert_ids_to_tokens(ids))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Return the names of tokens."""
        return [self.added_tokens_decoder.get(i) or chr(i) for i in ids]

    def convert_tokens_to_ids(self, _: str) -> None:
        """Know no names."""


LETTERS = Letters()
DETOKENIZER = Detokenizer(LETTERS)  # type: ignore[arg-type]  # all that is asked of it


def speak(
    said: list[int], stage: Stage = "either", stop: tuple[str, ...] = (), *, is_cut_off: bool = False
) -> tuple[str | None, str]:
    """Return reasoning and text of an answer; what was told piece by piece has to be the same."""
    told: list[str] = []
    parser = ReasoningParser(DETOKENIZER, ReasoningMarks(LETTERS), stage, stop, told.append)  # type: ignore[arg-type]  # all that is asked of it
    text = next((t for token in said if (t := parser.add(token)) is not None), None)
    if text is None:
        text = parser.end(is_cut_off=is_cut_off)
    parser.flush(text)
    thoughts = "".join(piece for piece in told if isinstance(piece, Thought))
    assert (thoughts, "".join(p for p in told if not isinstance(p, Thought))) == (
        parser.reasoning or "",
        text,
    )
    return parser.reasoning, text


def spell(text: str) -> list[int]:
    return [ord(letter) for letter in text]


MARKED = [1, *spell("\nSo\n\nit is.\n\n\n"), 2, *spell("\n\nYes.\n")]
SPELLED = spell("<think>\nSo\n\nit is.\n\n\n</think>\n\nYes.\n")


@pytest.mark.parametrize("said", [MARKED, SPELLED, [10, *MARKED], [*MARKED[:-8], *spell("</think>Yes.\n")]])
def test_marks_and_the_breaks_beside_them_are_in_neither(said: list[int]) -> None:
    """A mark may be a token or letters; line breaks inside of reasoning and text stay."""
    assert speak(said) == ("So\n\nit is.", "Yes.\n")


@pytest.mark.parametrize("said", [MARKED[1:], SPELLED[7:]])
def test_reasoning_that_the_prompt_began(said: list[int]) -> None:
    """Where the template writes the opening mark, the answer begins with the reasoning."""
    assert speak(said, "reasoning") == ("So\n\nit is.", "Yes.\n")


@pytest.mark.parametrize("text", ["Yes <think>", "<thin", "<", "  <thing>", "", "\n\nYes"])
def test_text_without_reasoning_is_all_text(text: str) -> None:
    """Also what begins like a mark, and a mark inside of text."""
    assert speak(spell(text)) == (None, text)


@pytest.mark.parametrize("mark", [[1], spell("<think>")])
def test_a_mark_behind_text_is_text(mark: list[int]) -> None:
    """What comes before it is not lost, also where it might have begun a mark."""
    assert speak([*spell("<"), *mark, *spell("a")]) == (None, "<<think>a")
    assert speak([*spell("\n "), *mark, *spell("a"), 2, *spell("b")]) == ("a", "b")


def test_reasoning_that_is_cut_off() -> None:
    """What there is of it is reasoning, and the text is empty."""
    assert speak(MARKED[:8], is_cut_off=True) == ("So\n\nit", "")


def test_stop_strings_end_the_text_alone() -> None:
    """The same string in the reasoning is a thought."""
    assert speak([1, *spell("a.b."), 2, *spell("c.d")], stop=(".",)) == ("a.b.", "c")
    assert speak(spell("<th"), stop=("h",)) == (None, "<t")


def test_prompts_say_what_an_answer_begins_with() -> None:
    """Templates open the reasoning, or close it for a model that is not to think, or leave it open."""
    marks = ReasoningMarks(LETTERS)  # type: ignore[arg-type]  # all that is asked of it

    assert marks.begin([*spell("Hi"), 1, 10]) == "reasoning"
    assert marks.begin([1, 10, 10, 2, 10, 10]) == "text"
    assert marks.begin(spell("assistant:")) == "either"
