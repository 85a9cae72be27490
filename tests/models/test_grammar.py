import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from penstock.errors import IncompleteOutputError, InvalidFormatError, PenstockError
from penstock.request import GenerationOptions
from penstock_workers.batching.feed import Answer
from penstock_workers.bundled import bundled_folder
from penstock_workers.generation.generator import Generator
from penstock_workers.generation.grammar import Grammars, restrict
from penstock_workers.generation.prompt import Prompt
from penstock_workers.settings import ModelSettings
from tests.models.odd_models import make_tokenizer
from tests.models.odd_tokenizers import byte_fallback, byte_level
from tests.models.test_generation import CPU, make_folder, one_thread, request

__all__ = ["one_thread"]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", "日本"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": {"type": "boolean"}, "minItems": 100_000}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """Return a small random Llama, whose vocabulary is wider than its tokenizer's."""
    settings = ModelSettings(task="generate", source=str(make_folder(tmp_path_factory.mktemp("llama"))))
    return Generator.load("chat", settings, CPU)


def schema(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema as a response format."""
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": content}}


def wanted(generator: Generator, response_format: dict[str, Any] | None, **fields: Any) -> Prompt:
    """Return a prompt whose answer has to follow a format; hot, so that anything allowed turns up."""
    options = {"temperature": 2.0, "seed": 1, "max_new_tokens": 200} | fields
    return generator.prepare(request(response_format=response_format, **options))


def outcomes(generator: Generator, prompts: list[Prompt]) -> list[Answer | PenstockError]:
    """Return what becomes of prompts that share their steps."""
    ended = dict(filter(None, generator.generate(prompts)))
    return [ended[index] for index in range(len(prompts))]


def texts(generator: Generator, prompts: list[Prompt]) -> list[str]:
    """Return the answers' texts; each ended by itself."""
    answers = outcomes(generator, prompts)
    assert [getattr(answer, "finish_reason", answer) for answer in answers] == ["stop"] * len(prompts)
    return [answer.text for answer in answers if isinstance(answer, Answer)]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9}, {"repetition_penalty": 1.5}], ids=str
)
def test_a_random_model_follows_a_schema(generator: Generator, options: dict[str, Any]) -> None:
    """Whatever the sampling, each answer is JSON with the properties, types and ranges of the schema."""
    prompts = [wanted(generator, schema(PERSON), **{"seed": seed} | options) for seed in range(8)]

    people = [json.loads(text) for text in texts(generator, prompts)]

    for person in people:
        assert list(person) == ["name", "age", "tags"]
        assert len(person["name"]) <= 12
        assert person["age"] in range(151)
        assert set(person["tags"]) <= {"red", "grün", "日本"}
    assert options.get("temperature") == 0 or len({person["name"] for person in people}) > 4


def test_any_object_is_json(generator: Generator) -> None:
    """`json_object` gives an object, or says that the limit came first."""
    prompts = [wanted(generator, {"type": "json_object"}, seed=seed) for seed in range(12)]

    ended = outcomes(generator, prompts)

    assert any(isinstance(outcome, Answer) for outcome in ended)
    for outcome in ended:
        assert isinstance(outcome, IncompleteOutputError) or isinstance(json.loads(outcome.text), dict)


CHOICES = ["yes", "yes, of course", 'no "never"', "日本\n🙂", "a/b\\c", "<|end|>", "%ignore"]
ODD_CHOICES = [
    "",
    " ",
    " yes",
    "\x00",
    "\x7f",
    "\x1b[0m",
    "\r\n",
    "\u2028",
    "👩‍👩‍👧",
    "\ufeff",
    "'\"`",
    "start: X",
    "x" * 300,
]


def test_choices_are_all_that_is_said(generator: Generator) -> None:
    """Each answer is one of the choices to the letter, one that begins another included."""
    prompts = [wanted(generator, {"type": "choice", "choices": CHOICES}, seed=seed) for seed in range(40)]

    said = texts(generator, prompts)

    assert set(said) <= set(CHOICES)
    assert len(set(said)) > 3


@pytest.mark.parametrize("choice", ODD_CHOICES, ids=ascii)
def test_any_string_is_a_possible_choice(generator: Generator, choice: str) -> None:
    """Nothing, spaces, control characters, quotes, emoji: what is named is said, to the letter."""
    alone = wanted(generator, {"type": "choice", "choices": [choice, choice]}, max_new_tokens=480)
    other = wanted(generator, {"type": "choice", "choices": [choice, choice + "b", "🙂"]}, max_new_tokens=480)

    said = texts(generator, [alone, other])

    assert said[0] == choice
    assert said[1] in (choice, choice + "b", "🙂")


def test_thousands_of_choices_are_one_format(generator: Generator) -> None:
    """The number of choices is bounded by their bytes alone."""
    choices = [f"choice {n}" for n in range(3000)]

    (said,) = texts(generator, [wanted(generator, {"type": "choice", "choices": choices})])

    assert said in choices


@pytest.mark.parametrize("pattern", ["[0-9]{3}-[0-9]{4}", r"[äöü]+/x\n?", r"^(a|bc){2,5}$", '"/\nx: "y"'])
def test_a_regex_matches_the_whole_answer(generator: Generator, pattern: str) -> None:
    """A pattern is anchored at both ends, and what it holds stays a pattern."""
    prompts = [
        wanted(generator, {"type": "regex", "pattern": pattern}, seed=seed, max_new_tokens=400)
        for seed in range(6)
    ]

    said = texts(generator, prompts)

    assert all(re.fullmatch(pattern, text) for text in said)


def test_batch_mates_change_nothing(generator: Generator) -> None:
    """Free requests draw the same beside constrained ones, and those the same alone, twice over."""
    free = [wanted(generator, None, seed=seed, max_new_tokens=30) for seed in range(4)]
    bound = [
        wanted(generator, response_format, seed=seed)
        for seed, response_format in enumerate(
            [
                schema(PERSON),
                {"type": "choice", "choices": CHOICES},
                {"type": "regex", "pattern": "[a-f]{20}"},
            ]
        )
    ]
    alone = [outcomes(generator, [prompt])[0] for prompt in (*free, *bound)]

    together = outcomes(generator, [*free, *bound])
    bound_alone = outcomes(generator, bound)
    free_alone = outcomes(generator, free)

    assert together == alone == [*free_alone, *bound_alone]


def test_an_answer_goes_on_in_its_format_after_a_failed_step(generator: Generator) -> None:
    """Rows that leave the batch and come back keep their place in the format, and their tokens."""
    prompts = [wanted(generator, schema(PERSON), seed=seed) for seed in range(4)]
    expected = texts(generator, prompts)
    n_passes = 0

    def fail_once(*_: Any) -> None:
        nonlocal n_passes
        n_passes += 1
        if n_passes == 9:
            raise RuntimeError("a lost device")

    hook = generator._model.register_forward_pre_hook(fail_once)
    said = texts(generator, prompts)
    hook.remove()

    assert said == expected


@pytest.mark.parametrize("n_new", [1, 7, 60])
def test_a_format_that_the_limit_cuts_is_an_error(generator: Generator, n_new: int) -> None:
    """JSON that does not end within the limit is no answer; the error has the text, and does not tell it."""
    prompts = [wanted(generator, schema(ENDLESS), max_new_tokens=n_new), wanted(generator, None)]

    cut, free = outcomes(generator, prompts)

    assert isinstance(cut, IncompleteOutputError)
    assert cut.n_tokens == n_new
    assert cut.text.startswith("[")
    assert "[" not in f"{cut} {cut!r}"
    assert isinstance(free, Answer)


def test_a_format_that_may_end_at_the_limit_is_an_answer(generator: Generator) -> None:
    """Where the text follows the format already, the limit ends it as it ends any other."""
    (answer,) = outcomes(
        generator, [wanted(generator, {"type": "regex", "pattern": "[a-z ]{3,}"}, max_new_tokens=40)]
    )

    assert isinstance(answer, Answer)
    assert re.fullmatch("[a-z ]{3,}", answer.text)


@pytest.mark.parametrize(
    ("response_format", "problem"),
    [
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable schema: minimum"),
        (schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "incompatible types"),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"type": "nonsense"}), "Invalid type: nonsense"),
        (schema({"not": {}, "x-guidance": {"lenient": True}}), "Unimplemented keys"),
        (schema({"$ref": "http://localhost:1/schema"}), "does not fetch"),
        ({"type": "regex", "pattern": "["}, "unclosed character class"),
        ({"type": "regex", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "regex", "pattern": r"(a)\1"}, "backreferences"),
        ({"type": "regex", "pattern": r"[^\s\S]"}, "nothing matches it"),
        ({"type": "regex", "pattern": ".*" * 500}, "too complex (precomputation failed)"),
        ({"type": "regex", "pattern": r"\bword\b"}, "word boundaries, and anchors inside a pattern"),
        (schema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "use anyOf, or tell them apart"),
        (schema({"type": "array", "items": {}, "uniqueItems": True}), '"uniqueItems"; nothing enforces them'),
        (
            schema({"type": "integer", "minimum": -(10**20), "maximum": 10**30}),
            "bounds of an integer have to lie within -2^63",
        ),
        (schema({"$ref": "#/$defs/none"}), "no definition #/$defs/none that its $ref names"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_followed_is_refused(
    generator: Generator, response_format: dict[str, Any], problem: str
) -> None:
    """A format without an answer, or that cannot be read, is refused before the model sees it, in a line."""
    with pytest.raises(InvalidFormatError, match=re.escape(problem)) as caught:
        wanted(generator, response_format)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "regex", "pattern": "(a?){5000}a{5000}"},
        schema(
            {
                "$ref": "#/$defs/node",
                "$defs": {
                    "node": {
                        "type": "object",
                        "properties": {"next": {"$ref": "#/$defs/node"}},
                        "required": ["next"],
                        "additionalProperties": False,
                    }
                },
            }
        ),
    ],
    ids=["regex with too many states", "schema that always asks for more"],
)
@pytest.mark.timeout(30)
def test_what_proves_too_complex_ends_alone(generator: Generator, response_format: dict[str, Any]) -> None:
    """A format that shows its cost while it is followed ends its own answer, and no other."""
    free, bound = wanted(generator, None), wanted(generator, schema(PERSON))
    expected = outcomes(generator, [free, bound])

    first, *others = outcomes(generator, [wanted(generator, response_format), free, bound])

    assert isinstance(first, InvalidFormatError)
    assert others == expected


@pytest.mark.timeout(30)
@pytest.mark.parametrize("pattern", [r"(x+x+)+y", r"(.*[ab].{30}){20}x", r"(([a-z])+.)+[A-Z]([a-z])+$"])
def test_patterns_that_blow_up_elsewhere_do_not(generator: Generator, pattern: str) -> None:
    """Patterns that take a backtracking matcher for ever cost no more than others."""
    (outcome,) = outcomes(generator, [wanted(generator, {"type": "regex", "pattern": pattern})])

    assert isinstance(outcome, Answer | IncompleteOutputError | InvalidFormatError)


def test_default_stops_do_not_cut_a_format(tmp_path: Path) -> None:
    """What ends the answers of a deployment does not end one that has to follow a format."""
    settings = ModelSettings(
        task="generate", source=str(make_folder(tmp_path)), generation=GenerationOptions(stop=('"', "a", "1"))
    )
    generator = Generator.load("chat", settings, CPU)

    said = texts(generator, [wanted(generator, schema(PERSON), seed=seed) for seed in range(4)])

    assert all(list(json.loads(text)) == ["name", "age", "tags"] for text in said)


def test_pieces_are_the_answer(generator: Generator) -> None:
    """Who listens hears the text of a constrained answer, piece by piece."""
    pieces: list[str] = []
    decoding = generator.decoding(max_rows=2)
    decoding.add(generator.sequence(wanted(generator, schema(PERSON)), on_piece=pieces.append))
    ended: list[Any] = []
    while not decoding.is_idle:
        ended += [outcome for _, outcome in decoding.step()]

    assert "".join(pieces) == ended[0].text
    assert len(pieces) > 5


def test_a_tokenizer_that_cannot_be_read_is_named() -> None:
    """A model whose tokenizer llguidance does not know answers freely, and refuses formats."""
    grammars = Grammars(PreTrainedTokenizerBase(), 320, [1])

    with pytest.raises(InvalidFormatError, match="tokenizer takes no formats"):
        grammars.compile({"type": "json_object"})


def test_tiny_chat_answers_in_json() -> None:
    """The bundled chat model, in the format it is served in."""
    settings = ModelSettings(task="generate", source=str(bundled_folder("tiny-chat")))
    generator = Generator.load("chat", settings, torch.device("cpu"))

    (said,) = texts(generator, [wanted(generator, schema(PERSON), temperature=0)])

    assert json.loads(said)["age"] in range(151)


@pytest.mark.parametrize("make", [byte_level, byte_fallback, make_tokenizer])
def test_no_text_is_a_special_token(make: Callable[[], PreTrainedTokenizerBase]) -> None:
    """Names of tokens may be chosen as letters; the tokens themselves stay out of any text."""
    tokenizer = make()
    names = [str(token) for token in tokenizer.added_tokens_decoder.values() if "<" in str(token)]
    grammars = Grammars(tokenizer, len(tokenizer), [1])

    for name in names:
        for choices in ([name], [f"a{name}b", "c"]):
            assert grammars.compile({"type": "choice", "choices": choices}) is not None
    anything = grammars.compile({"type": "regex", "pattern": "(?s:.+)"})
    assert anything is not None
    allowed = restrict(torch.zeros(1, len(tokenizer)), [anything.begin()])[0].isfinite()
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    assert not allowed[special].any()
    assert allowed.any()
