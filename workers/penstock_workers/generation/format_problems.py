"""What llguidance finds wrong with a format, in words of whoever wrote it."""

import re
from typing import Final

from llguidance import LLMatcher

MAX_PROBLEM_CHARACTERS: Final = 240
_TOO_COMPLEX: Final = "it is too complex (\\g<0>): ask for fewer or shorter repetitions, or a simpler schema"
# Its complaints, and what they mean to whoever wrote the format. Those that name a keyword or a place in a
# pattern are clear as they are.
_WORDS: Final = (
    (
        "coerce_one_of",
        "oneOf whose alternatives may match together cannot be enforced: use anyOf, or tell them apart by a"
        " required property with another const in each",
    ),
    (
        r"Unimplemented keys: \[(.*)\]",
        r"Unimplemented keys: \1; nothing enforces them, leave them out and check the answer",
    ),
    ("forced bytes", "the model's tokenizer has other letters for a part of it"),
    ("NoExtension(Bias)?", "nothing matches it that the model's tokens can say"),
    (
        "lookarounds not supported.*",
        "look-around, word boundaries, and anchors inside a pattern are not supported",
    ),
    (
        "(integer|number) range: min=.*",
        r"bounds of an \1 have to lie within -2^63 and 2^63 - 1, the lower one first",
    ),
    (
        r"Resource '(.*)' is not present.*",
        r"the schema does not fetch others: \1 is none of its own definitions; put it in $defs",
    ),
    ("Pointer '(.*)' does not exist", r"the schema has no definition #\1 that its $ref names"),
    (
        "precomputation failed|(?i:fuel|too (?:big|large|complex|many|deep)|exceed|limit|stack overflow)",
        _TOO_COMPLEX,
    ),
)
_PLACE: Final = re.compile(r"^(?:at )?\d+\(\d+\): ")  # in the grammar that is made of the format


def explain(matcher: LLMatcher) -> str:
    """Return what llguidance says is wrong: one line, in words of the format that was asked for."""
    lines = matcher.get_error().splitlines()
    told = next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
    told = _PLACE.sub("", told)
    for pattern, words in _WORDS:
        if found := re.search(pattern, told):
            told = found.expand(words)
            break
    return told[:MAX_PROBLEM_CHARACTERS]
