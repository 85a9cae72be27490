"""Words and names that tiny-chat's conversations are made of; no torch here."""

import random


def _listed(words: str, separator: str | None = None) -> list[str]:
    return words.split(separator)


COLOURS = _listed("red blue green yellow black white brown grey orange purple pink silver")
THINGS = _listed(
    "pump gate lamp valve door key cup box boat car bell book coat chair clock flag hat kite map pen "
    "rope ship spoon table tent train wheel bottle bridge candle basket engine hammer ladder mirror "
    "pipe bucket shovel fan knife"
)
PLACES = _listed(
    "kitchen garden office cellar garage attic hall library harbour station workshop shed bathroom tower"
)
DAYS = _listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _listed("January February March April May June July August September October November December")
KIN = _listed("dog cat sister brother boat horse teacher neighbour")
JSON_TEXT_KEYS = _listed("name city colour pet owner title job country")
JSON_NUMBER_KEYS = _listed("age size count year price weight level rooms")
LAST_WORDS = _listed("OVER ROGER please Captain sir friend AMEN Cheers thanks STOP Madam indeed")
TOPICS = _listed(
    "Paris|the moon|quantum physics|the weather|football|music|the stock market|dinosaurs|cooking|history|"
    "the news|politics|love|space travel|your family|the sea|machine learning|Shakespeare|black holes|"
    "philosophy|cars|the French revolution|chess|gardening|the universe|money|computers|Python|animals|"
    "volcanoes|art|religion|sleep|coffee|war and peace|climate change|Berlin|trees|poetry|the internet",
    "|",
)

REAL_NAMES = _listed(
    "Ada Alan Alice Amir Anna Ben Bob Carl Carla Chen Clara Dana David Diego Elena Emma Erik Eva Fatima "
    "Felix Finn Grace Hana Hugo Ida Ines Ivan Jack Jonas Julia Kai Karl Kofi Lara Leo Lena Liam Linus Lucy "
    "Maria Mark Maya Mia Mohammed Nadia Nina Noah Nora Olga Oscar Otto Paul Petra Priya Rosa Sam Sara Sofia "
    "Tariq Theo Tom Uma Vera Victor Wei Yuki Zoe London Oslo Paris Rome Lima Cairo Delhi Tokyo Lagos Quito"
)
_ONSETS = _listed("b bl br c ch d dr f fr g gr h j k kl l m n p pr qu r s sh st t th tr v w y z")
_VOWELS = _listed("a e i o u a e i o u a e i o u a e i o ai ee ou ia é ö ü")
_CODAS = ["", "", "", "", "n", "r", "l", "s", "m", "x", "ck", "nd", "rt"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw_word(rng: random.Random) -> str:
    """Make up a lower-case word, so that copying cannot lean on a known list."""
    if rng.random() < 0.4:
        return "".join(rng.choices(_LETTERS, k=rng.randint(2, 8)))
    n_syllables = rng.choice((1, 2, 2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(n_syllables))


def draw_name(rng: random.Random) -> str:
    """Draw the name of a person or a city, four times in five a made-up one."""
    if rng.random() < 0.2:
        return rng.choice(REAL_NAMES)
    return draw_word(rng).capitalize()


def draw_names(rng: random.Random, n_names: int) -> list[str]:
    """Draw `n_names` different names."""
    names: dict[str, None] = {}
    while len(names) < n_names:
        names[draw_name(rng)] = None
    return list(names)


def draw_things(rng: random.Random, n_things: int) -> list[str]:
    """Draw `n_things` different nouns, one in seven a made-up one."""
    return [draw_word(rng) if rng.random() < 0.15 else thing for thing in rng.sample(THINGS, n_things)]
