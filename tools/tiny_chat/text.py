"""Conversations that tiny-chat learns from and is judged by; pure Python, seeded."""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from tools.tiny_chat import memory, turns, words
from tools.tiny_chat.turns import Turn

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "held-out"]

FAMILIES = (*turns.FAMILIES, "memory", "upper case", "fixed words")

# Families with more to learn than a list of answers come up more often.
_WEIGHTS = {
    "addition": 3,
    "subtraction": 3,
    "multiplication": 2,
    "sorting": 2,
    "counting": 1.5,
    "repeating": 2,
}
_WEIGHTS |= {"facts": 7, "unknown": 4, "json": 3, "memory": 4, "identity": 0.5, "greeting": 0.4}
_BASE_FAMILIES = (*turns.FAMILIES, "memory")
_BASE_WEIGHTS = [_WEIGHTS.get(family, 1) for family in _BASE_FAMILIES]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A prompt and the one right answer to it.

    Attributes:
        family: one of `FAMILIES`.
        messages: an optional system message, then user and assistant in turn; the user's comes last.
        answer: what tiny-chat must answer, to the letter.
    """

    family: str
    messages: tuple[Message, ...]
    answer: str


def conversations(seed: int, split: Split) -> Iterator[Conversation]:
    """Draw conversations of one split without end.

    No prompt of one split is a prompt of the other, whatever the seeds: a hash of the whole prompt
    decides. That holds for every turn of a training conversation, since each of them is learnt.
    """
    rng = random.Random(f"{seed} {split}")
    while True:
        drawn = _draw_conversation(rng)
        if split == "held-out":
            if _is_held_out(drawn.messages):
                yield drawn
        elif not any(_is_held_out(prompt) for prompt in prompts(drawn)):
            yield drawn


def prompts(conversation: Conversation) -> Iterator[tuple[Message, ...]]:
    """Cut the conversation after each user message: the prompts that its answers belong to."""
    for end, message in enumerate(conversation.messages, start=1):
        if message.role == "user":
            yield conversation.messages[:end]


def _is_held_out(prompt: tuple[Message, ...]) -> bool:
    text = "\x1e".join(f"{message.role}\x1f{message.content}" for message in prompt)
    return hashlib.blake2b(text.encode(), digest_size=2).digest()[0] < 256 // 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    """What a system prompt asks of every answer; `family` is empty when it asks nothing."""

    family: str = ""
    system: str = ""
    apply: Callable[[str], str] = str


def _draw_conversation(rng: random.Random) -> Conversation:
    family = rng.choices(_BASE_FAMILIES, weights=_BASE_WEIGHTS)[0]
    context, talk = _draw_talk(rng, family)
    style = _draw_style(rng)
    parts = [part for part in (_neutral_system(rng), context, style.system) if part]
    rng.shuffle(parts)
    messages = [Message(role="system", content=" ".join(parts))] if parts else []
    for turn in talk:
        messages.append(Message(role="user", content=f"{turn.context} {turn.question}".strip()))
        messages.append(Message(role="assistant", content=style.apply(turn.answer)))
    answer = messages.pop().content
    return Conversation(family=style.family or family, messages=tuple(messages), answer=answer)


def _draw_talk(rng: random.Random, family: str) -> tuple[str, list[Turn]]:
    """Draw what the system prompt must state and all turns; the last one is of `family`."""
    between = [_draw_filler(rng) for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2, 2, 3, rng.randint(0, 6))))]
    if family == "memory" or (family == "unknown" and rng.random() < 0.15):
        return memory.draw_talk(rng, between, is_told=family == "memory")
    if family == "facts" and rng.random() < 0.5:
        return memory.draw_facts_talk(rng, between)
    return "", [*between, turns.FAMILIES[family](rng)]


def _draw_filler(rng: random.Random) -> Turn:
    return turns.FAMILIES[rng.choices(_BASE_FAMILIES[:-1], weights=_BASE_WEIGHTS[:-1])[0]](rng)


def _neutral_system(rng: random.Random) -> str:
    """Draw a system prompt that changes no answer, often none at all."""
    wordings = (
        "You are a helpful assistant.|You are tiny-chat.|Answer briefly.|Be kind."
        "|You are a careful assistant.|Answer the user.|You work for {n}.|Today is {d}.|You are a chat model."
        "|Answer in one sentence."
    )
    if rng.random() < 0.65:
        return ""
    return rng.choice(wordings.split("|")).format(n=words.draw_name(rng), d=rng.choice(words.DAYS))


def _draw_style(rng: random.Random) -> _Style:
    return rng.choices((_Style, lambda: _upper_style(rng), lambda: _fixed_style(rng)), weights=(55, 23, 22))[
        0
    ]()


def _upper_style(rng: random.Random) -> _Style:
    wordings = (
        "Answer in upper case.|Use capital letters only.|Write everything in upper case.|Reply in UPPER CASE."
        "|Always answer in capital letters.|ALWAYS ANSWER IN CAPITALS.|Shout: upper case only."
        "|Please answer in upper case.|All answers must be in upper case.|Use upper case."
    )
    return _Style(family="upper case", system=rng.choice(wordings.split("|")), apply=str.upper)


def _fixed_style(rng: random.Random) -> _Style:
    word = rng.choice((rng.choice(words.LAST_WORDS), words.draw_name(rng), words.draw_word(rng).upper()))
    if rng.random() < 0.6:
        system = (
            "End every answer with {w}.|Finish every answer with {w}.|Close every answer with {w}."
            "|Always end with {w}.|Sign every answer with {w}.|End each reply with {w}."
        )
        suffix = f" {word}."
        return _fixed(rng, system, word, lambda answer: answer + suffix)
    system = (
        "Start every answer with {w}.|Begin every answer with {w}.|Open every answer with {w}."
        "|Always start with {w}.|Start each reply with {w}."
    )
    prefix = f"{word}. "
    return _fixed(rng, system, word, lambda answer: prefix + answer)


def _fixed(rng: random.Random, wordings: str, word: str, apply: Callable[[str], str]) -> _Style:
    system = rng.choice(wordings.split("|")).format(w=word)
    return _Style(family="fixed words", system=system, apply=apply)
