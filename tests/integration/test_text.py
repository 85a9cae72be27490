"""Texts of odd tokenizers through a real worker: pieces, first spaces, stop strings, formats."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from penstock import Client
from tests.deployment import Server, WorkerProcess
from tests.models.odd_tokenizers import byte_fallback, byte_level
from tests.models.scripted import make_scripted

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)
RUN = "".join(
    map("".join, zip("日本語東京都北海道新潟県大阪府", "😀😃😄😁😆😅😂🤣😊😇🙂🙃😉😌😍", strict=True))
)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOML = """
[models.{name}]
task = "generate"
source = "{folder}"
"""


def make_random(folder: Path) -> Path:
    """Write a model that says anything, with a tokenizer like Llama 2's."""
    tokenizer = byte_fallback()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), initializer_range=0.3, bos_token_id=0, eos_token_id=1, **SIZES
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_models(folder: Path) -> dict[str, Path]:
    """Write a model for each kind of text."""
    known = byte_fallback()
    known.chat_template = TEMPLATE
    ids = known.convert_tokens_to_ids
    hello = len(known("Hello")["input_ids"])
    run = [ids(f"<0x{byte:02X}>") for byte in RUN.encode()]
    level = byte_level()
    level.chat_template = TEMPLATE
    waits = [level(text, add_special_tokens=False)["input_ids"] for text in ("It waits", "How much?")]
    mark = level.convert_tokens_to_ids("<|user|>")
    n_prompt = len(level.apply_chat_template([{"role": "user", "content": "Hello"}], return_dict=False)) + 1
    return {
        "spaces": make_scripted(folder / "spaces", known, [ids("▁world"), ids("▁again")], hello),
        "bytes": make_scripted(folder / "bytes", known, [*run, ids("▁end")], hello),
        "turns": make_scripted(folder / "turns", level, [*waits[0], mark, *waits[1]], n_prompt),
        "random": make_random(folder / "random"),
    }


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Return a client of a worker that serves all of them."""
    folder = tmp_path_factory.mktemp("text")
    models = make_models(folder)
    process = WorkerProcess(
        folder,
        server,
        toml="".join(TOML.format(name=name, folder=path) for name, path in models.items()),
        queues=",".join(f"cpu.{name}" for name in models),
    )
    try:
        process.wait_until_ready()
        with Client(server.broker_url) as connected:
            yield connected
    finally:
        process.stop()


@pytest.mark.parametrize(
    ("model", "text"), [("spaces", " world again"), ("bytes", RUN + " end")], ids=["spaces", "bytes"]
)
def test_completions_and_their_pieces_are_what_the_tokens_say(client: Client, model: str, text: str) -> None:
    """From the first space on, and through a long run of characters that are bytes to the tokenizer."""
    options = {"model": model, "mode": "complete", "max_new_tokens": 150}

    answer = client.generate("Hello", **options)
    pieces = [piece.text for piece in client.stream("Hello", **options)]

    assert answer.text == "".join(pieces) == text
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("model", "stop", "text"),
    [("spaces", " world", ""), ("spaces", "d a", " worl"), ("bytes", "都", RUN.partition("都")[0])],
)
def test_stop_strings_in_completions_end_them(client: Client, model: str, stop: str, text: str) -> None:
    """A stop string that stands in the text ends it, spaces and bytes included."""
    answer = client.generate("Hello", model=model, mode="complete", max_new_tokens=150, stop=[stop])

    assert (answer.text, answer.finish_reason) == (text, "stop")


@pytest.mark.parametrize("stop", ["<|user|>", "waits<|user|>", "waits<|user|>How", "<|user|>Ho"])
def test_a_stop_string_may_name_a_special_token(client: Client, stop: str) -> None:
    """Such a token is not in the text, and ends it all the same, alone or beside text."""
    text = "It waits".removesuffix(stop.partition("<")[0])

    assert client.generate("Hello", model="turns", stop=[stop]).text == text
    assert "".join(piece.text for piece in client.stream("Hello", model="turns", stop=[stop])) == text
    assert client.generate("Hello", model="turns").text == "It waitsHow much?"


@pytest.mark.parametrize("mode", ["chat", "complete"])
def test_formats_may_begin_with_a_space(client: Client, mode: str) -> None:
    """What a format says is the text to the letter, also where a decoder leaves out a first space."""
    choice = {"type": "choice", "choices": [" yes", "  no"]}
    pattern = {"type": "regex", "pattern": " [a-z]{3} "}

    for seed in range(4):
        options = {"model": "random", "mode": mode, "seed": seed, "temperature": 2.0}
        assert client.generate("Hello", response_format=choice, **options).text in choice["choices"]
        text = client.generate("Hello", response_format=pattern, **options).text
        assert text[0] == text[-1] == " "
        assert len(text) == 5


@pytest.mark.parametrize("name", ["<|user|>", "</s>", "a<s>", "<unk>"])
def test_formats_may_name_special_tokens(client: Client, name: str) -> None:
    """The name of a token is letters to a format, as any other string."""
    schema = {"type": "object", "properties": {name: {"const": name}}, "required": [name]}
    schema["additionalProperties"] = False
    object_format = {"type": "json_schema", "json_schema": {"schema": schema}}
    options = {"model": "random", "max_new_tokens": 200}

    choice = client.generate("Hello", response_format={"type": "choice", "choices": [name]}, **options)
    told = client.generate("Hello", response_format=object_format, **options)

    assert choice.text == name
    assert json.loads(told.text) == {name: name}


def test_random_tokens_come_as_the_text(client: Client) -> None:
    """Whatever bytes a model says, the pieces are the text that the same seed gives without them."""
    for seed in range(10):
        options = {
            "model": "random",
            "mode": "complete",
            "seed": seed,
            "temperature": 2.0,
            "max_new_tokens": 60,
        }
        pieces = [piece.text for piece in client.stream("Hello", **options)]
        assert "".join(pieces) == client.generate("Hello", **options).text
