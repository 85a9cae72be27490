"""Talks in which tiny-chat must remember: what the user told earlier, facts stated earlier."""

import random
from dataclasses import dataclass

from tools.tiny_chat import turns, words
from tools.tiny_chat.turns import Turn

_NOTED = "I will remember that."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """Something a user can tell about themselves; wordings are separated by `|`.

    Attributes:
        told: what the user says, without the full stop.
        told_by_system: the same in a system prompt.
        reply: the answer when it is told.
        asked: how the user asks for it later.
        answer: the answer then.
    """

    told: str
    told_by_system: str
    reply: str = _NOTED
    asked: str
    answer: str


_NAME = _Subject(
    told="My name is {n}|I am {n}|I'm {n}|Hello, my name is {n}|Hi, I am {n}|Call me {n}|Hello, I am {n}"
    "|Hi, my name is {n}|hi i am {n}|my name is {n}",
    told_by_system="The user is called {n}.|The user's name is {n}.|You are talking to {n}.",
    reply="Nice to meet you, {n}.",
    asked="What is my name?|What's my name?|Do you know my name?|Do you remember my name?|Who am I?"
    "|Tell me my name.|Please tell me my name.|What was my name?|what is my name|Say my name.",
    answer="Your name is {n}.",
)
_CITY = _Subject(
    told="I live in {n}|My home is in {n}|My city is {n}|I come from {n}",
    told_by_system="The user lives in {n}.|The user comes from {n}.",
    asked="Where do I live?|In which city do I live?|Which city do I live in?|What is my city?"
    "|where do i live",
    answer="You live in {n}.",
)
_COLOUR = _Subject(
    told="My favourite colour is {c}|I like {c} best|The colour I like best is {c}",
    told_by_system="The user's favourite colour is {c}.|The user likes {c} best.",
    asked="What is my favourite colour?|Which colour do I like best?|Do you know my favourite colour?"
    "|What colour do I like?|Tell me my favourite colour.",
    answer="Your favourite colour is {c}.",
)
_AGE = _Subject(
    told="I am {a} years old|My age is {a}",
    told_by_system="The user is {a} years old.",
    asked="How old am I?|What is my age?|Do you know my age?|Tell me my age.",
    answer="You are {a} years old.",
)
_KIN = _Subject(
    told="My {k} is called {n}|I have a {k} called {n}|The name of my {k} is {n}",
    told_by_system="The user has a {k} called {n}.",
    asked="What is my {k} called?|What is the name of my {k}?|Tell me the name of my {k}."
    "|Do you remember the name of my {k}?",
    answer="Your {k} is called {n}.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """One subject with its values filled in and one wording drawn for each field."""

    told: str
    told_by_system: str
    reply: str
    asked: str
    answer: str


def draw_talk(rng: random.Random, between: list[Turn], *, is_told: bool) -> tuple[str, list[Turn]]:
    """Draw a talk that ends with a question about the user.

    Args:
        rng: the source of every choice.
        between: turns about other things, to stand before and between.
        is_told: whether the user has told what the question asks; else nobody can know.

    Returns:
        What the system prompt states about the user, often nothing, and the turns.
    """
    subjects = rng.sample((_NAME, _CITY, _COLOUR, _AGE, _KIN), rng.choice((1, 2, 2, 3)))
    # The name is what users try first.
    if _NAME not in subjects and rng.random() < 0.5:
        subjects[0] = _NAME
    asked, *others = [_fill(rng, subject) for subject in rng.sample(subjects, len(subjects))]
    if not is_told:
        return _tell(rng, between, others, Turn(question=asked.asked, answer=turns.UNKNOWN))
    if rng.random() < 0.15:
        return _tell(rng, between, others, Turn(question=f"{asked.told}.", answer=asked.reply))
    if rng.random() < 0.1:
        context = f"{asked.told}."
        return _tell(rng, between, others, Turn(context=context, question=asked.asked, answer=asked.answer))
    return _tell(rng, between, [asked, *others], Turn(question=asked.asked, answer=asked.answer))


def draw_facts_talk(rng: random.Random, between: list[Turn]) -> tuple[str, list[Turn]]:
    """Draw a talk about facts that stand in the system prompt or in an earlier turn.

    Returns:
        The facts when the system prompt states them, else nothing, and the turns.
    """
    context, asked = turns.draw_facts(rng)
    questions = [Turn(question=question, answer=answer) for question, answer in asked[: rng.choice((1, 2))]]
    *earlier, last = questions
    place = rng.random()
    if place < 0.45:
        return context, [*_shuffled(rng, between + earlier), last]
    if place < 0.75:
        return "", [Turn(question=context, answer=_NOTED), *_shuffled(rng, between + earlier), last]
    first, *rest = questions
    stated = Turn(context=context, question=first.question, answer=first.answer)
    return "", [*between, stated, *rest]


def _fill(rng: random.Random, subject: _Subject) -> _Told:
    values = {
        "n": words.draw_name(rng),
        "c": rng.choice(words.COLOURS),
        "a": str(rng.randint(5, 99)),
        "k": rng.choice(words.KIN),
    }

    def draw(wordings: str) -> str:
        return rng.choice(wordings.split("|")).format(**values)

    return _Told(
        told=draw(subject.told),
        told_by_system=draw(subject.told_by_system),
        reply=draw(subject.reply),
        asked=draw(subject.asked),
        answer=draw(subject.answer),
    )


def _tell(rng: random.Random, between: list[Turn], told: list[_Told], last: Turn) -> tuple[str, list[Turn]]:
    """Let the system prompt or the user tell `told`, then end with `last`."""
    if rng.random() < 0.2:
        return " ".join(fact.told_by_system for fact in told), [*between, last]
    if len(told) > 1 and rng.random() < 0.3:
        first, second, *_ = told = sorted(told, key=lambda fact: fact.reply == _NOTED)
        second_half = second.told if second.told.startswith("I") else second.told[0].lower() + second.told[1:]
        both = Turn(question=f"{first.told} and {second_half}.", answer=first.reply)
        statements = [both, *(_statement(rng, fact) for fact in told[2:])]
    else:
        statements = [_statement(rng, fact) for fact in told]
    return "", [*_shuffled(rng, between + statements), last]


def _statement(rng: random.Random, fact: _Told) -> Turn:
    return Turn(question=fact.told + rng.choice((".", ".", ".", "", "!")), answer=fact.reply)


def _shuffled(rng: random.Random, drawn: list[Turn]) -> list[Turn]:
    return rng.sample(drawn, len(drawn))
