"""One text from pieces that come twice, are missing, or begin again."""

from dataclasses import replace

import pytest

from penstock.conversation import ToolCall
from penstock.errors import StreamRestartedError
from penstock.result import GenerateResult, Timings, Usage
from penstock.stream import OnRestart, Piece, Reader

USAGE = Usage(prompt_tokens=3, completion_tokens=4)


def result(text: str) -> GenerateResult:
    timings = Timings(queued_s=0, prepared_s=0, batched_s=0, computed_s=0)
    return GenerateResult(model="chat", text=text, finish_reason="stop", usage=USAGE, timings=timings)


def read(entries: list[tuple[str, int, str]], text: str, on_restart: OnRestart = "hide") -> list[Piece]:
    reader = Reader("job", on_restart)
    pieces = [piece for entry in entries for piece in reader.take(*entry)]
    return pieces + reader.end(result(text))


def texts(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces]


def test_pieces_make_the_text() -> None:
    """Each comes once, and the last one carries what the job cost."""
    pieces = read([("a", 0, "A pen"), ("a", 5, "stock")], "A penstock is a pipe.")

    assert texts(pieces) == ["A pen", "stock", " is a pipe."]
    assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
    assert pieces[-1].usage == USAGE


def test_an_answer_without_pieces_is_one_piece() -> None:
    """A worker that does not stream, or pieces that expired: the text comes from the result."""
    assert texts(read([], "A pipe.")) == ["A pipe."]
    assert texts(read([("a", 0, "A pipe.")], "A pipe.")) == ["A pipe.", ""]


def test_calls_come_with_the_end() -> None:
    """The last piece tells the calls that the text has."""
    calls: list[ToolCall] = [{"function": {"name": "weather", "arguments": "{}"}}]

    *_, last = Reader("job", "hide").end(replace(result("<call>"), tool_calls=calls))

    assert (last.text, last.tool_calls) == ("<call>", calls)


def test_what_is_sent_again_is_read_once() -> None:
    """A worker that got no answer sends a piece again, and what came since along with it."""
    pieces = read([("a", 0, "one"), ("a", 0, "one two"), ("a", 3, " two")], "one two three")

    assert texts(pieces) == ["one", " two", " three"]


def test_what_was_dropped_comes_with_the_result() -> None:
    """A reader that is far behind waits for the end, and nothing is out of order."""
    pieces = read([("a", 0, "one"), ("a", 7, " three"), ("a", 13, " four")], "one two three four")

    assert texts(pieces) == ["one", " two three four"]


def test_a_hidden_restart_goes_on_where_it_was() -> None:
    """What the second run repeats is left out, wherever its pieces begin and end."""
    pieces = read([("a", 0, "one two"), ("b", 0, "one"), ("b", 3, " two thr")], "one two three")

    assert texts(pieces) == ["one two", " thr", "ee"]


def test_a_shown_restart_begins_again() -> None:
    """The caller hears of it, and gets the text from its beginning."""
    pieces = read([("a", 0, "one two"), ("b", 0, "uno")], "uno due", "show")

    assert texts(pieces) == ["one two", "", "uno", " due"]
    assert [piece.is_restart for piece in pieces] == [False, True, False, False]


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([("a", 0, "one"), ("b", 0, "uno")], "uno"),
        ([("a", 0, "one")], "uno"),
        ([("a", 0, "one two")], "one"),
    ],
)
def test_another_text_cannot_be_hidden(entries: list[tuple[str, int, str]], text: str) -> None:
    """Whoever hides restarts gets an error where the second run says something else, and no mixture."""
    with pytest.raises(StreamRestartedError, match="job job began again"):
        read(entries, text)


def test_a_restart_that_only_the_result_tells_is_shown() -> None:
    """The second run's pieces may be missing altogether."""
    pieces = read([("a", 0, "one")], "uno", "show")

    assert texts(pieces) == ["one", "", "uno"]


def test_a_run_that_was_followed_by_another_is_over() -> None:
    """A worker that was stopped, thought dead and woken writes into the void."""
    pieces = read([("a", 0, "one"), ("b", 0, "one"), ("a", 3, " and a half"), ("b", 3, " two")], "one two")

    assert texts(pieces) == ["one", " two", ""]


def test_reasoning_and_text_are_told_apart() -> None:
    """Each counts its own characters; what is missing of either comes with the result, reasoning first."""
    reader = Reader("job", "hide")
    taken = [("a", 0, "Hm", "reasoning"), ("a", 0, "Y", "text"), ("b", 0, "Hm, s", "reasoning")]
    pieces = [piece for run, at, text, part in taken for piece in reader.take(run, at, text, part)]  # type: ignore[arg-type]  # literals in a list

    pieces += reader.end(replace(result("Yes"), reasoning="Hm, so"))

    assert [(piece.reasoning, piece.text) for piece in pieces] == [
        ("Hm", ""),
        ("", "Y"),
        (", s", ""),
        ("o", ""),
        ("", "es"),
    ]


def test_a_restart_with_other_reasoning_is_an_error() -> None:
    """Thoughts are compared as the text is."""
    reader = Reader("job", "hide")
    reader.take("a", 0, "one", "reasoning")

    with pytest.raises(StreamRestartedError):
        reader.take("b", 0, "two", "reasoning")
    with pytest.raises(StreamRestartedError):
        reader.end(replace(result("one"), reasoning="two"))
