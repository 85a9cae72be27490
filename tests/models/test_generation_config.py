"""A model's own configuration: what it says is done, or named; what is wrong in it is refused at load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.errors import InputTooLongError, ModelLoadError
from penstock_workers.generation.generator import Generator
from penstock_workers.settings import ModelSettings
from tests.models.odd_models import change_json
from tests.models.test_generation import CPU, answers, load, make_folder, make_tokenizer, one_thread, request

__all__ = ["one_thread"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small random model."""
    return make_folder(tmp_path)


def say(generator: Generator, **fields: Any) -> list[int]:
    """Return the tokens of an answer."""
    prompt = generator.prepare(request("Say: water.", **({"max_new_tokens": 40} | fields)))
    decoding = generator.decoding(max_rows=1)
    row = generator.sequence(prompt)
    decoding.add(row)
    while not decoding.is_idle:
        decoding.step()
    return list(row.tokens.output)


def expect(folder: Path, prompt: tuple[int, ...]) -> list[int]:
    """Return what `generate` of transformers says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = model.generate(torch.tensor([list(prompt)]), max_new_tokens=40, do_sample=False)
    return [int(token) for token in found[0, len(prompt) :]]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(200, 320))},
        {"begin_suppress_tokens": list(range(5, 150))},
        {"bad_words_ids": [[1], *([i] for i in range(5, 150)), [7, 9]]},
        {"min_new_tokens": 30, "eos_token_id": list(range(1, 150))},
        {"min_length": 45, "eos_token_id": list(range(1, 150))},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=lambda value: str(value)[:40],
)
def test_answers_are_those_of_generate(fields: dict[str, Any], folder: Path) -> None:
    """With the same fields in `generation_config.json`, the same tokens."""
    plain = say(load(folder))
    change_json(folder / "generation_config.json", **fields)
    generator = load(folder)

    found = say(generator)

    assert found == expect(folder, generator.prepare(request("Say: water.")).ids)
    assert (found == plain) == (not fields)


def test_words_that_are_bad_together_are_not_said(folder: Path) -> None:
    """A sequence is forbidden at its last token."""
    first = say(load(folder))
    change_json(folder / "generation_config.json", bad_words_ids=[first[3:6]])

    found = say(load(folder))

    assert found[:5] == first[:5]
    assert found[5] != first[5]


def test_a_format_wins_over_what_the_model_forbids(folder: Path) -> None:
    """What a caller asks for can be said."""
    tokenizer = make_tokenizer()
    change_json(
        folder / "generation_config.json",
        suppress_tokens=tokenizer("yes", add_special_tokens=False)["input_ids"],
        no_repeat_ngram_size=1,
    )
    generator = load(folder)

    prompt = generator.prepare(request(response_format={"type": "choice", "choices": ["yes yes"]}))

    assert answers(generator, [prompt])[0].text == "yes yes"


def test_what_is_not_served_is_named_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning names the fields that would change answers, and no others."""
    change_json(
        folder / "generation_config.json",
        num_beams=4,
        typical_p=0.9,
        guidance_scale=1.0,
        epsilon_cutoff=0.0,
        watermarking_config={"greenlist_ratio": 0.25},
        sequence_bias=[[[5], -1.0]],
        use_cache=True,
        pad_token_id=-1,
        chat_format="chatml",
    )

    load(folder)

    told = [line for line in caplog.messages if "not served" in line]
    assert len(told) == 1
    assert told[0].endswith(": chat_format, num_beams, sequence_bias, typical_p, watermarking_config")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"eos_token_id": 320}, "eos_token_id: 320 is no token, the model has 320"),
        ({"eos_token_id": [1, -1]}, "eos_token_id: -1 is no token"),
        ({"eos_token_id": "1"}, "eos_token_id: tokens' ids, not '1'"),
        ({"eos_token_id": [[1]]}, "eos_token_id: tokens' ids"),
        ({"suppress_tokens": [5000]}, "suppress_tokens: 5000 is no token"),
        ({"suppress_tokens": list(range(320))}, "they leave no token"),
        ({"begin_suppress_tokens": [True]}, "begin_suppress_tokens: tokens' ids"),
        ({"bad_words_ids": [5]}, "bad_words_ids: lists of tokens' ids"),
        ({"bad_words_ids": [[5, 9999]]}, "bad_words_ids: 9999 is no token"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"min_new_tokens": "3"}, "min_new_tokens"),
        ({"max_length": 1.5}, "max_length"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"do_sample": True, "temperature": -0.5}, "temperature"),
        ({"do_sample": True, "temperature": "hot"}, "temperature"),
        ({"do_sample": True, "temperature": 7.0}, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"do_sample": True, "min_p": 2.0}, "min_p"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop_strings": 5}, "stop"),
        ({"stop_strings": ["a"] * 17}, "stop"),
        ({"stop_strings": [""]}, "stop"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_values_are_refused_at_load(fields: dict[str, Any], reason: str, folder: Path) -> None:
    """They are checked as a caller's options are: one line with field and value."""
    change_json(folder / "generation_config.json", **fields)

    with pytest.raises(ModelLoadError, match=reason) as refused:
        load(folder)

    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["{", "[]", "null", '"a"'])
def test_a_file_that_cannot_be_read_is_refused(text: str, folder: Path) -> None:
    """Transformers would go on as if there were none."""
    (folder / "generation_config.json").write_text(text)

    with pytest.raises(ModelLoadError, match=r"generation_config|cannot be loaded"):
        load(folder)


def test_nulls_and_integers_are_fine(folder: Path) -> None:
    """What files hold in practice: null for nothing, whole numbers where fractions may be."""
    found = json.loads((folder / "generation_config.json").read_text())
    fields = {"do_sample": True, "temperature": 1, "top_k": None, "top_p": 1, "stop_strings": "eel"}
    (folder / "generation_config.json").write_text(json.dumps(found | fields | {"min_p": None}))

    prompt = load(folder).prepare(request(max_new_tokens=4))

    assert prompt.sampling.temperature == 1.0
    assert prompt.stop.strings[0] == "eel"


def test_max_length_bounds_prompt_and_answer(folder: Path) -> None:
    """Where neither call nor settings say how long an answer may be."""
    change_json(folder / "generation_config.json", max_length=40)
    generator = load(folder)
    prompt = generator.prepare(request("a"))

    assert prompt.n_tokens + prompt.max_new_tokens == 40
    assert generator.prepare(request("a", max_new_tokens=100)).max_new_tokens == 100
    assert load(folder, max_new_tokens=90).prepare(request("a")).max_new_tokens == 90
    with pytest.raises(InputTooLongError):
        generator.prepare(request("word " * 60))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_attention_of_another_machine_is_replaced(dtype: str, folder: Path) -> None:
    """The answers are those of an attention that is there."""
    expected = say(load(folder))
    change_json(folder / "config.json", _attn_implementation="flash_attention_3")
    settings = {"task": "generate", "source": str(folder), "dtype": dtype}

    assert say(Generator.load("chat", ModelSettings.model_validate(settings), CPU)) == expected
