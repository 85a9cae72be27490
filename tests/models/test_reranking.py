"""Rerankers of odd architectures: a pair's score is its own, whoever is in its batch."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from penstock.errors import ModelLoadError
from penstock.request import RerankRequest
from penstock_workers.embedding.reranker import Reranker
from penstock_workers.settings import ModelSettings
from tests.models.odd_models import ENCODERS, SIZES, change_json, make_classifier, make_tokenizer

DOCUMENTS = ["the water falls", "a <pad> in water", "water " * 300, "", "wheel " * 7]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] + ': ' + m['content'] }}</s>{% endfor %}<s>answer:"


def load(folder: Path) -> Reranker:
    """Load a folder's model."""
    settings = ModelSettings(task="rerank", source=str(folder), pools=("cpu",))
    return Reranker.load("model", settings, torch.device("cpu"))


def make_causal(folder: Path, kind: str) -> Path:
    """A language model with a template for chats, as Qwen3-Reranker is published."""
    torch.manual_seed(1)
    model_type, own = ENCODERS[kind]
    sizes: dict[str, Any] = SIZES | own
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes)).save_pretrained(folder)
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def make_scoring(folder: Path, kind: str) -> Path:
    """The same, with the two tokens whose logits are the score."""
    transformer = Transformer(str(make_causal(folder / "bare", kind)), transformer_task="text-generation")
    modules = [transformer, LogitScore(true_token_id=100, false_token_id=101)]
    CrossEncoder(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


def check_scores(engine: Reranker, folder: Path) -> None:
    """Compare the scores of one batch with those of `predict` for each pair alone."""
    request = RerankRequest(model="model", query="water wheel", documents=DOCUMENTS)
    scores = dict(filter(None, engine.run(engine.prepare(request))))

    model = CrossEncoder(str(folder), device="cpu", max_length=engine.max_tokens)
    expected = [float(model.predict([(request.query, document)])[0]) for document in DOCUMENTS]
    assert [scores[i] for i in range(len(DOCUMENTS))] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-2


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "deberta-v2", "modernbert", "gpt2", "qwen3", "longformer"]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score(kind: str, side: str, tmp_path: Path) -> None:
    """On whichever side a tokenizer pads: positions that count from the left would be shifted."""
    folder = make_classifier(tmp_path, kind)
    change_json(folder / "tokenizer_config.json", padding_side=side)

    check_scores(load(folder), folder)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_language_models_score_pairs(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their template ends behind a long document too; where padding shifts positions, a warning says so."""
    folder = make_scoring(tmp_path, kind)
    caplog.set_level(logging.WARNING)

    engine = load(folder)
    short, long = engine.prepare(RerankRequest(model="model", query="q", documents=["a", "a " * 999]))

    check_scores(engine, folder)
    assert long.n_tokens == engine.max_tokens
    assert long.part("input_ids")[-8:].tolist() == short.part("input_ids")[-8:].tolist()
    assert ("scored one by one" in caplog.text) == (kind == "gpt2")


def test_a_model_that_scores_all_alike_is_refused(tmp_path: Path) -> None:
    """A chat model whose tokenizer has no `yes` and `no` would put documents into any order."""
    with pytest.raises(ModelLoadError, match="it gives all pairs the same score"):
        load(make_causal(tmp_path, "qwen3"))
