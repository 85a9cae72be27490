import pytest

from penstock_workers.generation.stop_strings import TextStream


def say(text: str, *stop: str, trim: str = "") -> tuple[str, list[str]]:
    """Return the text that comes of these letters, one by one, and its pieces."""
    pieces: list[str] = []
    stream = TextStream(stop, pieces.append, trim=trim)
    found = next((t for letter in text if (t := stream.add(letter)) is not None), None)
    if found is None:
        found = stream.end()
    stream.flush(found)
    return found, pieces


@pytest.mark.parametrize("text", ["", "plain words", "Größe 日本語 🙂 und Gefälle " * 9, "naïve\ufffd!"])
def test_pieces_are_the_text(text: str) -> None:
    """Put together, the pieces are the text; none is empty."""
    found, pieces = say(text, "never")

    assert found == "".join(pieces) == text
    assert all(pieces)


def test_stop_string_ends_the_text() -> None:
    """The text ends before the first stop string, of which no piece shows a letter."""
    found, pieces = say("One. Two. STOP Three", "STOP", "Three")

    assert found == "".join(pieces) == "One. Two. "


def test_beginning_of_a_stop_string_is_held_back() -> None:
    """What may become a stop string waits until it cannot; at the end it is text after all."""
    found, pieces = say("a ST b STO", "STOP")

    assert found == "".join(pieces) == "a ST b STO"
    assert "S" not in pieces
    assert pieces[-1] == "STO"


def test_earliest_of_several_stop_strings() -> None:
    """Of two that end at the same letter the text is cut before the one that begins first."""
    assert say("xx abc", "bc", "abc")[0] == "xx "


@pytest.mark.parametrize("pieces", [["xabcb"], ["x", "a", "b", "c", "b"], ["xa", "bcb"], ["xab", "cb"]])
def test_the_stop_string_that_is_complete_first_counts(pieces: list[str]) -> None:
    """However the text comes in pieces, it is the same."""
    stream = TextStream(["abc", "b", "cb"])

    assert next(text for piece in pieces if (text := stream.add(piece)) is not None) == "xa"


def test_what_is_behind_a_stop_string_is_kept_apart() -> None:
    """It is no text, and whoever stopped there can go on with it."""
    stream = TextStream(["</x>"])

    assert stream.add("a</x>b") == "a"
    assert stream.rest == "b"


def test_trimmed_characters_are_in_no_piece() -> None:
    """Line breaks at the end are left out, those inside are not."""
    found, pieces = say("\na\n\nb\n\n", trim="\n")

    assert found == "".join(pieces) == "\na\n\nb"


def test_halves_of_characters_go_where_the_text_was_cut_off() -> None:
    """They are in no piece before something follows; else the text has them."""
    pieces: list[str] = []
    stream = TextStream((), pieces.append, trim_if_cut="\ufffd")

    stream.add("a\ufffd")
    stream.add("b\ufffd")

    assert pieces == ["a", "\ufffdb"]
    assert stream.end(is_cut_off=True) == "a\ufffdb"
    assert stream.end() == "a\ufffdb\ufffd"


@pytest.mark.parametrize(
    ("stop", "text"), [("<x>", "a b"), ("b<x>", "a "), ("b<x>c", "a "), ("<x>c", "a b"), ("bc", "a bc")]
)
def test_what_is_no_text_can_be_part_of_a_stop_string(stop: str, text: str) -> None:
    """A token that is not shown ends the text where a stop string names it, alone or beside text."""
    pieces: list[str] = []
    stream = TextStream([stop], pieces.append)

    parts = [("a ", True), ("b", True), ("<x>", False), ("c", True)]
    found = next(
        (t for part, is_shown in parts if (t := stream.add(part, is_shown=is_shown)) is not None), None
    )
    found = stream.end() if found is None else found
    stream.flush(found)

    assert found == "".join(pieces) == text


def test_nobody_listens() -> None:
    """Without stop strings and listener nothing depends on when text comes."""
    assert TextStream(()).may_come_late
    assert not TextStream(["a"]).may_come_late
    assert not TextStream((), print).may_come_late
