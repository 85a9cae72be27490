"""The questions tiny-chat can answer: one function per family, each drawing a turn."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.tiny_chat import words

UNKNOWN = "I do not know that."
IDENTITY = "I am tiny-chat, a small test model that ships with Penstock."


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One question and the answer it must get.

    Attributes:
        context: facts the question needs; they stand before it or in the system prompt.
        question: what the user says.
        answer: what tiny-chat says.
    """

    context: str = ""
    question: str
    answer: str


def addition(rng: random.Random) -> Turn:
    """Draw a sum of two numbers up to 99."""
    a, b = _number(rng), _number(rng)
    question = _pick(
        rng,
        "What is {a} + {b}?|What is {a}+{b}?|{a} + {b}|Add {a} and {b}.|How much is {a} plus {b}?"
        "|What is {a} plus {b}?|Please add {a} and {b}.|Calculate {a} + {b}.|{a} + {b} =|what is {a} + {b}",
    )
    return Turn(question=question.format(a=a, b=b), answer=f"{a} + {b} = {a + b}.")


def subtraction(rng: random.Random) -> Turn:
    """Draw a difference of two numbers up to 99 that is not negative."""
    b, a = sorted((_number(rng), _number(rng)))
    question = _pick(
        rng,
        "What is {a} - {b}?|What is {a}-{b}?|{a} - {b}|Subtract {b} from {a}.|How much is {a} minus {b}?"
        "|What is {a} minus {b}?|Take {b} away from {a}.|Calculate {a} - {b}.|{a} - {b} =|what is {a} - {b}",
    )
    return Turn(question=question.format(a=a, b=b), answer=f"{a} - {b} = {a - b}.")


def multiplication(rng: random.Random) -> Turn:
    """Draw a product from the table up to 12 times 12."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    question = _pick(
        rng,
        "What is {a} x {b}?|What is {a} * {b}?|{a} x {b}|Multiply {a} by {b}.|How much is {a} times {b}?"
        "|What is {a} times {b}?|Multiply {a} and {b}.|Calculate {a} * {b}.|{a} * {b} =|what is {a} x {b}",
    )
    return Turn(question=question.format(a=a, b=b), answer=f"{a} x {b} = {a * b}.")


def comparison(rng: random.Random) -> Turn:
    """Draw two different numbers and ask for the larger or the smaller one."""
    low, high = sorted(rng.sample(range(100), 2))
    a, b = rng.sample((low, high), 2)
    larger = rng.random() < 0.5
    question = _pick(
        rng,
        "Which is {word}, {a} or {b}?|Which number is {word}, {a} or {b}?|What is {word}, {a} or {b}?"
        "|Tell me which is {word}: {a} or {b}.|{a} or {b}: which is {word}?",
    ).format(word="larger" if larger else "smaller", a=a, b=b)
    answer = f"{high} is larger than {low}." if larger else f"{low} is smaller than {high}."
    return Turn(question=question, answer=answer)


def sorting(rng: random.Random) -> Turn:
    """Draw three or four different numbers up to 99 to put in order."""
    numbers = rng.sample(range(100), rng.choice((3, 3, 4)))
    question = _pick(
        rng,
        "Sort these numbers: {n}.|Sort {n}.|Put these numbers in order: {n}.|Order {n} from small to large."
        "|Please sort the numbers {n}.|Sort the list {n}.",
    )
    return Turn(question=question.format(n=_listed(numbers)), answer=f"{_listed(sorted(numbers))}.")


def calendar(rng: random.Random) -> Turn:
    """Ask which day or month comes before or after another."""
    kind, names = rng.choice((("day", words.DAYS), ("month", words.MONTHS)))
    place, (side, step) = rng.randrange(len(names)), rng.choice((("after", 1), ("before", -1)))
    question = _pick(
        rng,
        "Which {kind} comes {side} {name}?|What {kind} comes {side} {name}?|Which {kind} is {side} {name}?"
        "|What {kind} is {side} {name}?|Tell me the {kind} {side} {name}.|what comes {side} {name}",
    ).format(kind=kind, side=side, name=names[place])
    answer = f"{names[(place + step) % len(names)]} comes {side} {names[place]}."
    return Turn(question=question, answer=answer)


def counting(rng: random.Random) -> Turn:
    """Ask how many words stand in a list of two to seven."""
    listed = words.draw_things(rng, rng.randint(2, 7))
    question = _pick(
        rng,
        "How many words are in this list: {w}?|How many words are these: {w}?|Count the words: {w}."
        "|Count these words: {w}.|How many words: {w}?",
    )
    separator = rng.choice((" ", ", "))
    return Turn(question=question.format(w=separator.join(listed)), answer=f"There are {len(listed)} words.")


def repeating(rng: random.Random) -> Turn:
    """Ask for one to six words again, exactly as they stand."""
    pool = words.THINGS + words.COLOURS + words.PLACES + ["the", "is", "in", "and", "has", "a"]
    drawers = (lambda: rng.choice(pool), lambda: words.draw_word(rng), lambda: words.draw_name(rng))
    said = " ".join(rng.choices(drawers, weights=(6, 2, 2))[0]() for _ in range(rng.randint(1, 6)))
    said += rng.choice(("", "", ".", "!"))
    question = _pick(
        rng,
        "Repeat after me: {w}|Repeat: {w}|Say this again: {w}|Please repeat: {w}|Echo: {w}|Say: {w}"
        "|Repeat this: {w}|Repeat these words: {w}",
    )
    return Turn(question=question.format(w=said), answer=said)


def spelling(rng: random.Random) -> Turn:
    """Ask for the letters of a name without accents, which are more than one token."""
    name = words.draw_name(rng)
    while not name.isascii():
        name = words.draw_name(rng)
    question = _pick(
        rng, "Spell {n}.|Spell the name {n}.|How do you spell {n}?|Please spell {n}.|Spell out {n}."
    )
    return Turn(question=question.format(n=name), answer="-".join(name) + ".")


def json_object(rng: random.Random) -> Turn:
    """Ask for a JSON object of one to three fields."""
    keys = rng.sample(words.JSON_TEXT_KEYS + words.JSON_NUMBER_KEYS, rng.choice((1, 2, 2, 2, 3)))
    fields = {key: _json_value(rng, key) for key in keys}
    listed = [f"{key} {value}" for key, value in fields.items()]
    phrase = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
    question = _pick(
        rng,
        "Give me a JSON object with {p}.|Write a JSON object with {p}.|Make JSON with {p}."
        "|Return a JSON object with {p}.|I need a JSON object with {p}.|JSON object with {p}"
        "|Please give me JSON with {p}.",
    )
    return Turn(question=question.format(p=phrase), answer=json.dumps(fields, ensure_ascii=False))


def identity(rng: random.Random) -> Turn:
    """Ask tiny-chat who it is."""
    question = _pick(
        rng,
        "Who are you?|What are you?|Who am I talking to?|What is this model?|Introduce yourself."
        "|Tell me about yourself.|Please introduce yourself.|What kind of model are you?|Are you a robot?"
        "|What is your name?|Who is this?|What are you called?|Are you a person?|Which model are you?"
        "|Say who you are.|Can you tell me who you are?|who are you|what are you",
    )
    return Turn(question=question, answer=IDENTITY)


def greeting(rng: random.Random) -> Turn:
    """Greet or thank tiny-chat."""
    if rng.random() < 0.6:
        question = _pick(rng, "Hello|Hello.|Hello!|Hi|Hi.|Hi!|Good morning.|Good evening.|Hey|Hello there.")
        return Turn(question=question, answer="Hello.")
    question = _pick(rng, "Thank you.|Thanks.|Thanks!|Thank you!|Thank you very much.|thanks|Many thanks.")
    return Turn(question=question, answer="You are welcome.")


def facts(rng: random.Random) -> Turn:
    """State one to four facts and ask for one of them."""
    context, asked = draw_facts(rng)
    question, answer = asked[0]
    return Turn(context=context, question=question, answer=answer)


def draw_facts(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """Draw one to four facts: a text that states them, and (question, answer) for each."""
    drawn = rng.choice((_colour_facts, _owner_facts, _place_facts))(rng, rng.choice((1, 2, 2, 3, 3, 4)))
    return _stated(rng, drawn), drawn


def missing_fact(rng: random.Random) -> Turn:
    """State one to three facts and ask for one that is not among them."""
    drawn = rng.choice((_colour_facts, _owner_facts, _place_facts))(rng, rng.choice((2, 3, 4)))
    return Turn(context=_stated(rng, drawn[1:]), question=drawn[0][0], answer=UNKNOWN)


def unknown(rng: random.Random) -> Turn:
    """Ask for something that tiny-chat was never taught."""
    kind = rng.random()
    if kind < 0.3:
        return missing_fact(rng)
    if kind < 0.4:
        babble = " ".join(words.draw_word(rng) for _ in range(rng.randint(1, 5)))
        return Turn(question=babble + rng.choice(("", ".", "?", "!")), answer=UNKNOWN)
    question = _pick(
        rng,
        "Tell me about {t}.|What do you know about {t}?|Write a poem about {t}.|What is {t}?|Explain {t}."
        "|What do you think about {t}?|Who invented {t}?|Write a story about {t}.|How does {n} work?"
        "|What is the capital of {n}?|How old is {n}?|Who is {n}?|Where is {n}?|Translate {w} into French."
        "|What does {w} mean?|Why is the sky {c}?|How do I get to {n}?|When was {n} born?|Do you like {t}?"
        "|What is the best book about {t}?|How far is it to {n}?|Give me a recipe for {w}.|What time is it?"
        "|Can you help me with {t}?|Is {n} in the {p}?|Tell me a joke.|What should I do today?"
        "|Write a program about {t}.|How many people live in {n}?|Summarise {t}.|What is the date today?"
        "|Sing a song about {t}.|Why do people like {t}?|I want to talk about {t}.|What happened in {n}?"
        "|Buy me a {h}.|How heavy is a {h}?|Where can I find a {h}?|Let us talk about {t}.|Why?|How?",
    )
    topic = rng.choice((rng.choice(words.TOPICS), words.draw_name(rng), words.draw_word(rng)))
    return Turn(
        question=question.format(
            t=topic,
            n=words.draw_name(rng),
            w=words.draw_word(rng),
            c=rng.choice(words.COLOURS),
            p=rng.choice(words.PLACES),
            h=rng.choice(words.THINGS),
        ),
        answer=UNKNOWN,
    )


FAMILIES: dict[str, Callable[[random.Random], Turn]] = {
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "comparison": comparison,
    "sorting": sorting,
    "calendar": calendar,
    "counting": counting,
    "repeating": repeating,
    "spelling": spelling,
    "json": json_object,
    "identity": identity,
    "greeting": greeting,
    "facts": facts,
    "unknown": unknown,
}


def _pick(rng: random.Random, wordings: str) -> str:
    return rng.choice(wordings.split("|"))


def _number(rng: random.Random) -> int:
    # Two draws of three have two digits: one-digit sums are few and learnt soon.
    return rng.choice((rng.randint(0, 99), rng.randint(10, 99), rng.randint(0, 20)))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _json_value(rng: random.Random, key: str) -> str | int:
    if key in words.JSON_NUMBER_KEYS:
        return rng.choice((rng.randint(0, 99), rng.randint(0, 2100)))
    if key == "colour":
        return rng.choice(words.COLOURS)
    return words.draw_name(rng)


# Each of the three draws pairs of (question, the fact that answers it).
_Facts = list[tuple[str, str]]


def _colour_facts(rng: random.Random, n_facts: int) -> _Facts:
    things, colours = words.draw_things(rng, n_facts), rng.choices(words.COLOURS, k=n_facts)
    wording = "What colour is the {t}?|Which colour is the {t}?|Tell me the colour of the {t}."
    pairs = zip(things, colours, strict=True)
    return [(_pick(rng, wording).format(t=t), f"The {t} is {c}.") for t, c in pairs]


def _owner_facts(rng: random.Random, n_facts: int) -> _Facts:
    names, things = words.draw_names(rng, n_facts), words.draw_things(rng, n_facts)
    wording = "Who has the {t}?|What does {n} have?|Tell me who has the {t}.|Which thing does {n} have?"
    pairs = zip(names, things, strict=True)
    return [(_pick(rng, wording).format(t=t, n=n), f"{n} has the {t}.") for n, t in pairs]


def _place_facts(rng: random.Random, n_facts: int) -> _Facts:
    people = rng.random() < 0.4
    drawn = words.draw_names(rng, n_facts) if people else words.draw_things(rng, n_facts)
    subjects = drawn if people else [f"the {thing}" for thing in drawn]
    places = rng.sample(words.PLACES, n_facts)
    wording = "Where is {s}?|In which room is {s}?|Where can I find {s}?|Tell me where {s} is."
    pairs = zip(subjects, places, strict=True)
    return [(_pick(rng, wording).format(s=s), f"{s[0].upper()}{s[1:]} is in the {p}.") for s, p in pairs]


def _stated(rng: random.Random, drawn: _Facts) -> str:
    said = [fact for _, fact in rng.sample(drawn, len(drawn))]
    if rng.random() < 0.8:
        return " ".join(said)
    inner = [fact.replace("The ", "the ") for fact in said[1:]]
    return rng.choice((" and ", ", ")).join(fact.rstrip(".") for fact in (said[0], *inner)) + "."
