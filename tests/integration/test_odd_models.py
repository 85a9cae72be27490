"""Models that other software failed on, served by one real worker."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from penstock import Client
from penstock.errors import InvalidOptionError
from tests.deployment import Server, WorkerProcess
from tests.models.odd_models import change_json, make_classifier, make_encoder, make_static
from tests.models.test_generation import make_folder
from tests.models.test_templates import LAST_ONLY, PARTS

EMBED = '[models.{0}]\ntask = "embed"\nsource = "{1}"\nengine = "torch"\n'
RERANK = '[models.{0}]\ntask = "rerank"\nsource = "{1}"\n'
GENERATE = '[models.{0}]\ntask = "generate"\nsource = "{1}"\ngeneration = {{ max_new_tokens = 8 }}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models."""
    folder = tmp_path_factory.mktemp("models")
    make_static(folder / "static")
    make_encoder(folder / "decoder", "gpt2", has_padding=False)
    make_encoder(folder / "roberta", "roberta")
    make_encoder(folder / "flash", "bert")
    change_json(folder / "flash/config.json", _attn_implementation="flash_attention_2")
    make_classifier(folder / "left", "roberta")
    change_json(folder / "left/tokenizer_config.json", padding_side="left")
    make_folder(folder / "parts", template=PARTS, no_repeat_ngram_size=1)
    make_folder(folder / "last", template=LAST_ONLY)
    return folder


@pytest.fixture(scope="module")
def client(server: Server, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a worker that serves them all."""
    kinds = {"static": EMBED, "decoder": EMBED, "roberta": EMBED, "flash": EMBED}
    kinds |= {"left": RERANK, "parts": GENERATE, "last": GENERATE}
    toml = "".join(table.format(name, folder / name) for name, table in kinds.items())
    queues = ",".join(f"cpu.{name}" for name in kinds)
    worker = WorkerProcess(tmp_path_factory.mktemp("worker"), server, toml=toml, queues=queues)
    try:
        worker.wait_until_ready(180)
        with Client(server.broker_url, results_url=server.results_url) as client:
            yield client
    finally:
        worker.stop()


TEXTS = ["the water falls", "a <pad> in water", "water " * 300, "</s> wheel"]


@pytest.mark.parametrize("name", ["static", "decoder", "roberta", "flash"])
def test_vectors_are_those_of_encode(name: str, client: Client, folder: Path) -> None:
    """Static embeddings, a decoder without padding, RoBERTa's positions, another machine's attention."""
    model = SentenceTransformer(
        str(folder / name),
        device="cpu",
        model_kwargs={"attn_implementation": None} if name != "static" else {},
    )
    if name == "decoder":
        model.tokenizer.pad_token = "<mask>"
    if name == "roberta":
        model.max_seq_length = 64

    found = client.embed(TEXTS, model=name, timeout_s=120, normalize_embeddings=True)

    expected = np.stack([model.encode(text, normalize_embeddings=True) for text in TEXTS])
    assert (found * expected).sum(axis=1).min() > 0.9999


def test_scores_are_those_of_predict(client: Client, folder: Path) -> None:
    """Also where the tokenizer pads on the side from which positions count."""
    model = CrossEncoder(str(folder / "left"), device="cpu", max_length=64)

    found = client.rerank("water wheel", TEXTS, model="left", timeout_s=120).scores

    expected = [model.predict([("water wheel", text)])[0] for text in TEXTS]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_words_reach_a_template_of_parts(client: Client) -> None:
    """Each word of text and system prompt is a token of the prompt."""
    short = client.generate("water", model="parts", timeout_s=120)
    long = client.generate("water" * 20, model="parts", system_prompt="wheel" * 20, timeout_s=120)

    assert long.usage.prompt_tokens > short.usage.prompt_tokens + 30


def test_a_history_that_would_be_dropped_is_refused(client: Client) -> None:
    """Who sends one is told; questions are answered."""
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    client.generate("water", model="last", timeout_s=120)
    with pytest.raises(InvalidOptionError, match="leaves out earlier turns"):
        client.generate("water", model="last", history=history, timeout_s=120)
