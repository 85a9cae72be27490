"""What a model's files hold, and what is missing in them: the right vectors, or one line at load."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer

from penstock.errors import EngineError, ModelLoadError
from penstock.request import EmbedRequest, RerankRequest
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.embedding.reranker import Reranker
from penstock_workers.settings import ModelSettings
from tests.models.odd_models import (
    ENCODERS,
    SIZES,
    change_json,
    drop_weights,
    make_classifier,
    make_counts,
    make_dense,
    make_encoder,
    make_static,
    make_tokenizer,
    make_words,
)

CPU = torch.device("cpu")
TEXTS = [
    "The water falls.",
    "water gate water turbine",
    "a <pad> in the middle of water",
    "<pad><pad>gate",
    "</s><mask> wheel <s> <unk>",
    "pipe [SEP] [PAD] [CLS]",
    "nul \0 byte, water",
    " \n water \t ",
    "the water and the wheel " * 40,
]


def load(folder: Path, **fields: Any) -> Embedder:
    """Load it as a worker does."""
    settings = {"task": "embed", "source": str(folder), "engine": "torch", **fields}
    return Embedder.load("m", ModelSettings.model_validate(settings), CPU)


def load_reranker(folder: Path) -> Reranker:
    """Load it as a worker does."""
    return Reranker.load("m", ModelSettings(task="rerank", source=str(folder)), CPU)


def embed(engine: Embedder, texts: list[str]) -> NDArray[np.float32]:
    """Embed all texts in one batch, shape (n_texts, dim)."""
    found = dict(filter(None, engine.run(engine.prepare(EmbedRequest(model="m", texts=texts)))))
    return np.stack([found[i] for i in range(len(texts))])


def expect(model: SentenceTransformer, texts: list[str]) -> NDArray[np.float32]:
    """Embed texts one by one, as `encode` does."""
    return np.stack([model.encode(text) for text in texts])


def worst_cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the least cosine of two rows."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / lengths).min())


@pytest.mark.parametrize("kind", ENCODERS)
def test_vectors_are_those_of_encode(kind: str, tmp_path: Path) -> None:
    """Whatever is typed into a text, control tokens and padding among it, and however long it is."""
    folder = make_encoder(tmp_path, kind)
    engine = load(folder, dtype="float32")
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = engine.max_tokens

    found = embed(engine, TEXTS)

    assert engine.max_tokens == (64 if SIZES | ENCODERS[kind][1] and "66" in str(ENCODERS[kind][1]) else 128)
    assert worst_cosine(found, expect(model, TEXTS)) > 0.99999


@pytest.mark.parametrize("make", [make_static, make_words, make_counts, make_dense])
def test_what_is_no_transformer_is_served(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Static embeddings, tables of words and bags of words give `encode`'s vectors."""
    folder = make(tmp_path)
    texts = [text for text in TEXTS if "water" in text.split()]

    found = embed(load(folder), texts)

    assert worst_cosine(found, expect(SentenceTransformer(str(folder), device="cpu"), texts)) > 0.9999


def test_static_embeddings_are_cached_by_their_vocabulary(tmp_path: Path) -> None:
    """Two bags of words with other weights are two models."""
    prints = []
    for weight in (0.5, 0.25):
        folder = make_counts(tmp_path / str(weight))
        change_json(next(folder.rglob("0_BoW/config.json")), word_weights={"water": weight})
        engine = load(folder, cache={})
        prints.append(engine.fingerprint)

    assert prints[0] != prints[1]


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_decoder_without_padding_token_is_served(kind: str, tmp_path: Path) -> None:
    """Masks say what is padding; which token fills it is all one."""
    folder = make_encoder(tmp_path, kind, has_padding=False)
    model = SentenceTransformer(str(folder), device="cpu")
    model.tokenizer.pad_token = "<mask>"  # `encode` asks for one

    found = embed(load(folder), TEXTS)

    assert worst_cosine(found, expect(model, TEXTS)) > 0.9999


@pytest.mark.parametrize("kind", ["bert", "t5", "deberta-v2"])
def test_attention_that_is_not_installed_is_replaced(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The configuration of another machine changes no vector; one line names it."""
    folder = make_encoder(tmp_path, kind)
    expected = embed(load(folder), TEXTS)
    change_json(folder / "config.json", _attn_implementation="flash_attention_2")
    change_json(folder / "sentence_bert_config.json", model_args={"attn_implementation": "org/kernel"})

    found = embed(load(folder), TEXTS)

    assert worst_cosine(found, expected) > 0.9999
    told = [line for line in caplog.messages if "attention flash_attention_2, org/kernel" in line]
    assert len(told) == 1


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_missing_weights_are_refused(kind: str, tmp_path: Path) -> None:
    """A model whose files lack what computes does not load; the pooler, which nothing uses, may lack."""
    folder = make_encoder(tmp_path, kind)
    gone = drop_weights(folder, lambda key: key.startswith("pooler"))
    expected = [embed(load(folder), TEXTS) for _ in range(2)]
    assert len(gone) == 2
    assert np.array_equal(*expected)

    drop_weights(folder, lambda key: "layer.1." in key and "LayerNorm" in key)

    with pytest.raises(ModelLoadError, match=r"6 weights are missing in its files, the first is encoder"):
        load(folder)


@pytest.mark.parametrize("key", ["word_embeddings", "token_type_embeddings", "position_embeddings"])
def test_a_missing_table_is_refused(key: str, tmp_path: Path) -> None:
    """One weight is enough."""
    folder = make_encoder(tmp_path)
    drop_weights(folder, lambda name: key in name)

    with pytest.raises(ModelLoadError, match=f"1 weight is missing in its files, the first is .*{key}"):
        load(folder)


def test_caches_find_vectors_of_a_model_without_a_pooler(tmp_path: Path) -> None:
    """What is missing and unused is the same at each start, and so is the model's fingerprint."""
    folder = make_encoder(tmp_path)
    drop_weights(folder, lambda key: key.startswith("pooler"))

    assert load(folder, cache={}).fingerprint == load(folder, cache={}).fingerprint


def test_modules_without_weights_are_refused(tmp_path: Path) -> None:
    """The layers that sentence-transformers adds are no exception."""
    folder = make_dense(tmp_path)
    file = next(folder.glob("2_Dense/model.safetensors"))
    tensors = load_file(file)
    save_file({key: tensors[key] for key in tensors if "bias" not in key}, file)
    with pytest.raises(ModelLoadError, match=r"Missing key.*bias"):
        load(folder)

    file.unlink()
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load(folder)


def test_a_layer_too_many_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A configuration with fewer layers than the files have is served as it says, with a line."""
    folder = make_encoder(tmp_path)
    change_json(folder / "config.json", num_hidden_layers=1)

    load(folder)

    assert "16 weights in its files are not used, the first is encoder.layer.1." in caplog.text


def test_a_cross_encoder_does_not_embed(tmp_path: Path) -> None:
    """Its vectors were never trained to mean anything."""
    with pytest.raises(ModelLoadError, match=r"a BertForSequenceClassification's, which is not for"):
        load(make_classifier(tmp_path / "bare"))

    CrossEncoder(str(tmp_path / "bare"), device="cpu").save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ModelLoadError, match=r"a CrossEncoder's, and task = 'embed' takes a Sentence"):
        load(tmp_path / "saved")
    assert load_reranker(tmp_path / "saved").max_tokens == 128


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_reranker_without_its_head_is_refused(kind: str, tmp_path: Path) -> None:
    """An embedding model has none: it would order documents at random."""
    with pytest.raises(ModelLoadError, match=r"missing in its files, the first is (pre_)?classifier"):
        load_reranker(make_encoder(tmp_path, kind))


def test_a_reranker_reads_as_far_as_its_positions(tmp_path: Path) -> None:
    """Long pairs are cut where RoBERTa's table ends, and score as `predict` says."""
    folder = make_classifier(tmp_path, "roberta")
    engine = load_reranker(folder)
    request = RerankRequest(model="m", query="water", documents=["the water falls " * 40, "a <pad> gate"])

    scores = dict(filter(None, engine.run(engine.prepare(request))))

    model = CrossEncoder(str(folder), device="cpu", max_length=engine.max_tokens)
    pairs = [(request.query, document) for document in request.documents]
    expected = [float(model.predict([pair])[0]) for pair in pairs]
    assert engine.max_tokens == 64
    assert [scores[0], scores[1]] == pytest.approx(expected, abs=1e-5)


def shard_is_gone(folder: Path) -> None:
    """An index that names a file which is not there."""
    tensors = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def other_shape(folder: Path) -> None:
    """A table of another width."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "position_embeddings" in key)
    save_file(tensors | {key: tensors[key][:, :16].contiguous()}, file, metadata={"format": "pt"})


def not_a_number(folder: Path) -> None:
    """Weights that are not finite."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "word_embeddings" in key)
    save_file(tensors | {key: tensors[key] * float("nan")}, file, metadata={"format": "pt"})


def many_tokens(folder: Path) -> None:
    """A tokenizer of another model."""
    make_encoder(folder, vocab_size=40)


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (shard_is_gone, "model-00001-of-00002"),
    (other_shape, "another shape than its configuration says, as .*position_embeddings.weight"),
    (not_a_number, "not finite"),
    (many_tokens, "the tokenizer has 320 tokens, the model 40"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is not a valid JSON file"),
    (lambda folder: (folder / "config.json").write_text("[]"), "cannot be loaded"),
    (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no file named"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    (lambda folder: (folder / "modules.json").write_text('[{"idx": 0}]'), "cannot be loaded"),
    (lambda folder: change_json(folder / "config.json", model_type="surprise"), "surprise"),
    (lambda folder: change_json(folder / "tokenizer_config.json", model_max_length=-1), "OverflowError"),
    (lambda folder: change_json(folder / "config.json", num_attention_heads=5), "cannot be loaded"),
    (lambda folder: change_json(folder / "config.json", hidden_act="nope"), "cannot be loaded"),
    (
        lambda folder: change_json(folder / "config.json", intermediate_size=48),
        r"another shape than its configuration says, as encoder.layer.{0, 1}.",
    ),
    (lambda folder: change_json(folder / "adapter_config.json", peft_type="LORA"), "it is an adapter"),
    (
        lambda folder: change_json(folder / "config.json", architectures=["BertForTokenClassification"]),
        "which is not for task = 'embed'",
    ),
]


@pytest.mark.parametrize(("break_it", "reason"), BROKEN)
def test_broken_folders_end_in_one_line(
    break_it: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    """Whatever is wrong with the files is told in one line of type ModelLoadError."""
    folder = make_encoder(tmp_path)
    break_it(folder)

    with pytest.raises(ModelLoadError, match=reason) as refused:
        load(folder)

    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 500


def test_texts_with_tokens_that_the_model_lacks_fail_alone(tmp_path: Path) -> None:
    """A token that was added to the tokenizer alone is its text's error, not its batch's."""
    folder = make_encoder(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)
    engine = load(folder)

    texts = engine.prepare(EmbedRequest(model="m", texts=["water", "water <|new|>", "wheel"]))
    found = dict(filter(None, engine.run(texts)))

    assert isinstance(found[1], EngineError)
    assert all(isinstance(found[i], np.ndarray) for i in (0, 2))


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"auto_map": {"AutoModel": "org/other--modeling.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "org/other--tokens.Tokenizer"]}}),
    ],
)
def test_code_of_another_repository_is_refused(file: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """No revision pins it: it would be taken as it is there at that moment."""
    folder = make_encoder(tmp_path)
    change_json(folder / file, **fields)

    with pytest.raises(ModelLoadError, match="its code lies in another repository, org/other"):
        load(folder, trust_remote_code=True)


def test_tables_of_transformers_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A load says in lines of our own what it found."""
    folder = make_encoder(tmp_path)
    drop_weights(folder, lambda key: key.startswith("pooler"))
    with caplog.at_level(logging.INFO):
        load(folder)

    assert "LOAD REPORT" not in caplog.text
