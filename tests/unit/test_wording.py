import pytest

from penstock_workers.engines.wording import Wording


def decode(ids: list[int]) -> str:
    """Turn tokens into text: each token is a byte."""
    return bytes(ids).decode(errors="replace")


def say(text: str | bytes, *stop: str, limit: int | None = None) -> tuple[str, list[str]]:
    """Return the text that comes of these bytes, one token each, and its pieces."""
    pieces: list[str] = []
    wording = Wording(decode, stop, pieces.append)
    for token in (text.encode() if isinstance(text, str) else text)[:limit]:
        if (found := wording.add(token)) is not None:
            break
    else:
        found = wording.end(is_cut_off=limit is not None)
    wording.tell_rest(found)
    return found, pieces


@pytest.mark.parametrize("text", ["", "plain words", "Größe 日本語 🙂 und Gefälle " * 9, "naïve\ufffd!"])
def test_pieces_are_the_text(text: str) -> None:
    """Put together, the pieces are the text; each is of whole characters."""
    found, pieces = say(text, "never")

    assert found == "".join(pieces) == text
    assert all(pieces)


def test_pieces_come_with_their_tokens() -> None:
    """Without a stop string nothing is held back but half a character."""
    _, pieces = say("aé日")

    assert pieces == ["a", "é", "日"]


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


def test_stop_string_of_half_characters() -> None:
    """A stop string is found over the tokens of its last character."""
    assert say("eins 日本 zwei", "本") == ("eins 日", ["e", "i", "n", "s", " ", "日"])


def test_limit_inside_a_character() -> None:
    """Half a character at the end is left out, of the text and of the pieces."""
    assert say("a日", limit=3) == ("a", ["a"])


def test_earliest_of_several_stop_strings() -> None:
    """Of two that end at the same token the text is cut before the one that begins first."""
    assert say("xx abc", "bc", "abc")[0] == "xx "


def test_nobody_listens() -> None:
    """Without stop strings and pieces, text is decoded once, at the end."""
    calls: list[int] = []
    wording = Wording(lambda ids: calls.append(1) or decode(ids), ())  # type: ignore[func-returns-value]  # append

    for token in b"abc":
        wording.add(token)

    assert calls == []
    assert wording.end(is_cut_off=False) == "abc"
