"""Texts laid end to end: the same vectors as alone, for every architecture that allows it."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from penstock.errors import EngineError
from penstock.request import EmbedRequest
from penstock_workers.batching.batcher import Batcher
from penstock_workers.batching.cuts import cut_by_tokens
from penstock_workers.batching.feed import Job
from penstock_workers.embedding.attention import _attend, packed
from penstock_workers.embedding.bfloat16 import use_bfloat16
from penstock_workers.embedding.choosing import Ways
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.embedding.packed import Packed, PackedBert
from penstock_workers.embedding.padded import Padded
from penstock_workers.embedding.row import RowLayout, group_lengths
from penstock_workers.settings import ModelSettings

CPU = torch.device("cpu")
SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]  # padding is not 0, as with RoBERTa
WORDS = ["gate", "turbine", "pipe", "water", "lake", "falls", "from", "the", "вода", "水", "!", "a"]

Small = dict[str, Any]
Make = Callable[[Small], PreTrainedModel]

PACKED: dict[str, tuple[Make, str]] = {
    "bert": (lambda small: BertModel(BertConfig(**small)), "mean"),
    "bert-cls": (lambda small: BertModel(BertConfig(**small)), "cls"),
    "roberta": (lambda small: RobertaModel(RobertaConfig(**small)), "mean"),
    "xlm-roberta": (lambda small: XLMRobertaModel(XLMRobertaConfig(**small)), "cls"),
    "modernbert": (
        lambda small: ModernBertModel(ModernBertConfig(**small, local_attention=16, num_hidden_layers=4)),
        "mean",
    ),
    "qwen3": (
        lambda small: Qwen3Model(Qwen3Config(**small, num_key_value_heads=2, head_dim=16)),
        "lasttoken",
    ),
}
PADDED: dict[str, tuple[Make, str]] = {
    "mpnet": (lambda small: MPNetModel(MPNetConfig(**small)), "mean"),  # positions are biases of its own
    "eager": (lambda small: BertModel._from_config(BertConfig(**small), attn_implementation="eager"), "mean"),
}


def build(path: Path, kind: str) -> SentenceTransformer:
    """A small random model on disk, with attention sharp enough for every batch mate to count."""
    (path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    torch.manual_seed(0)
    make, pooling = {**PACKED, **PADDED}[kind]
    small = {
        "vocab_size": len(SPECIAL + WORDS),
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 300,
        "initializer_range": 0.2,
        "pad_token_id": 1,
    }
    if kind != "modernbert":
        small["num_hidden_layers"] = 2
    make(small).save_pretrained(path / "transformer")
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path / "transformer")
    how = {"attn_implementation": "eager"} if kind == "eager" else {}
    modules = [Transformer(str(path / "transformer"), max_seq_length=256, model_kwargs=how)]
    modules += [Pooling(64, pooling_mode=pooling), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save_pretrained(str(path / "model"))
    return model


def load(path: Path, dtype: str = "float32", device: torch.device = CPU) -> Embedder:
    """Load it as a worker of two threads does, in which no C computes."""
    settings = {"task": "embed", "source": str(path / "model"), "engine": "torch", "dtype": dtype}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return Embedder.load("small", ModelSettings.model_validate(settings), device)
    finally:
        torch.set_num_threads(before)


def texts_of(n_words: list[int], seed: int = 0) -> list[str]:
    """Random texts of so many words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, n)) for n in n_words]


def embed(engine: Embedder, texts: list[str]) -> NDArray[np.float32]:
    """Embed all texts in one batch, shape (n_texts, dim)."""
    found = dict(engine.run(engine.prepare(EmbedRequest(model="small", texts=texts))))
    return np.stack([found[i] for i in range(len(texts))])


def packed_way(engine: Embedder) -> Packed:
    """Return what a model that was loaded in float32 by torch is packed by."""
    assert isinstance(engine._way, Packed)
    return engine._way


def ways(engine: Embedder, dtype: str = "float32", runtime: str = "torch") -> Ways:
    """Return what a model may be computed by; its vectors are those of the way that is in use."""
    settings = {"task": "embed", "source": "here", "dtype": dtype, "engine": runtime}
    return engine._ways(ModelSettings.model_validate(settings), engine._embed_probe())


LENGTHS = [1, 90, 7, 7, 33, 250, 8, 1, 34, 120, 7, 16, 32, 64]


@pytest.mark.parametrize("kind", [*PACKED, "mpnet"])
def test_vectors_are_those_of_encode(tmp_path: Path, kind: str) -> None:
    """With batch mates of any lengths, a text's vector is the one that `encode` gives it."""
    model = build(tmp_path, kind)
    engine = load(tmp_path)
    texts = texts_of(LENGTHS)

    together = embed(engine, texts)

    assert engine.batching == ("packed" if kind in PACKED else "padded")
    assert engine.is_padded == (engine.batching == "padded")
    assert engine.n_heads == 4
    assert np.allclose(together, model.encode(texts, batch_size=1), atol=1e-5)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("is_bfloat16", [False, True])
def test_a_text_never_sees_its_batch_mates(tmp_path: Path, kind: str, is_bfloat16: bool) -> None:
    """Other words around a text change no bit of its vector."""
    build(tmp_path, kind)
    engine = load(tmp_path)
    if is_bfloat16:
        use_bfloat16(engine._model)
    texts, others = texts_of(LENGTHS), texts_of(LENGTHS, seed=1)
    mixed = [text if i % 2 else other for i, (text, other) in enumerate(zip(texts, others, strict=True))]

    assert np.array_equal(embed(engine, texts)[1::2], embed(engine, mixed)[1::2])


def test_float16_is_packed_too(tmp_path: Path) -> None:
    """Half precision throughout is close to float32, and its batches have no padding."""
    model = build(tmp_path, "bert")
    engine = load(tmp_path, "float16")
    texts = texts_of(LENGTHS)

    assert (engine.batching, engine.dtype) == ("packed", "float16")
    assert (embed(engine, texts) * model.encode(texts, batch_size=1)).sum(axis=1).min() >= 0.999


@pytest.mark.parametrize("kind", PADDED)
def test_what_does_not_fit_is_padded_and_told(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An architecture with attention of its own is served in padded batches, and the log says so."""
    build(tmp_path, kind)
    engine = load(tmp_path)
    if kind == "eager":  # the file does not keep the choice
        engine._model[0].auto_model.set_attn_implementation("eager")
        engine._way = Padded(engine._model, engine._collator)
        assert ways(engine).pack() is None

    assert engine.batching == "padded"
    assert "batches are padded" in caplog.text


def test_a_model_that_mixes_batch_mates_is_padded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The probe finds a model whose layers look beyond their own text other than by attention."""

    class Smear(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return states + states.roll(1, dims=1)

    model = build(tmp_path, "bert")
    model[0].auto_model.embeddings.dropout = Smear()
    engine = Embedder("small", model)

    assert ways(engine).pack() is None

    assert "batches are padded" in caplog.text
    assert model[0].auto_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_softmax_of_each_text(
    n_kv_heads: int, is_causal: bool, window: int | None, dtype: torch.dtype
) -> None:
    """Both ways give torch's own attention, one text at a time in float32; bfloat16 to its 8 bits."""
    torch.manual_seed(0)
    lengths = [3, 3, 5, 20, 21, 33, 100, 100]
    heads = [torch.randn(1, n, sum(lengths), 16).to(dtype) for n in (4, n_kv_heads, n_kv_heads)]

    with torch.inference_mode(), packed(RowLayout(lengths, CPU)) as layout:
        found, _ = _attend(nn.Module(), *heads, None, scaling=0.5, is_causal=is_causal, sliding_window=window)

    assert layout.is_safe()
    start = 0
    for length in lengths:
        q, k, v = (states[0, :, start : start + length].float() for states in heads)
        apart = torch.arange(length)[:, None] - torch.arange(length)
        seen = (apart.abs() < (window or length)) & ((apart >= 0) | (not is_causal))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.5, enable_gqa=True)
        close = 1e-5 if dtype == torch.float32 else 0.05
        assert torch.allclose(found[0, start : start + length].transpose(0, 1).float(), expected, atol=close)
        start += length


def test_large_scores_are_computed_again(tmp_path: Path) -> None:
    """Where the quick exponentials overflow, softmax gives the vectors."""
    torch.set_num_threads(2)  # by one thread C computes, which has no such limit
    model = build(tmp_path, "bert")
    for name, weight in model[0].auto_model.named_parameters():
        if "query.weight" in name:
            weight.data.mul_(30)
    model.save_pretrained(str(tmp_path / "model"))
    engine = load(tmp_path)
    texts = texts_of(LENGTHS)
    use_bfloat16(engine._model)

    found = embed(engine, texts)

    assert packed_way(engine)._n_unsafe > 0
    assert np.isfinite(found).all()
    assert np.array_equal(embed(engine, texts), found)


def test_broken_vectors_never_leave(tmp_path: Path) -> None:
    """A vector that is zero or of the wrong size is its text's error."""
    model = build(tmp_path, "bert")
    engine = load(tmp_path)
    texts = engine.prepare(EmbedRequest(model="small", texts=["gate", "water falls"]))

    engine.dim = 63
    wrong = [answer for _, answer in engine.run(texts)]
    engine.dim = 64
    norm = engine._model[0].auto_model.encoder.layer[1].output.LayerNorm
    nn.init.zeros_(norm.weight)
    zero = [answer for _, answer in engine.run(texts)]

    assert model.get_embedding_dimension() == 64
    assert [str(error) for error in wrong] == [
        str(EngineError("small", "a vector has 64 numbers, not 63"))
    ] * 2
    assert [str(error) for error in zero] == [str(EngineError("small", "a vector is zero or not finite"))] * 2


@pytest.mark.parametrize("power", [1, 2])
def test_no_group_wastes_more_than_it_may(power: int) -> None:
    """All lengths are there in their order; a group with the next one's first would waste too much."""
    lengths = sorted([3, 3, 3, 4, 7, 8, 9, 20, 21, 200, 256, 256])

    groups = group_lengths(lengths, power, 100)

    def waste(group: list[int]) -> int:
        return len(group) * max(group) ** power - sum(length**power for length in group)

    assert [length for group in groups for length in group] == lengths
    assert all(waste(group) <= 100 for group in groups)
    assert all(waste([*one, other[0]]) > 100 for one, other in pairwise(groups))


def test_what_costs_nothing_is_one_group() -> None:
    """Equal lengths waste nothing, and all may waste all."""
    assert group_lengths([5, 5, 5], 2, 0) == [[5, 5, 5]]
    assert group_lengths([1, 50], 1, 49) == [[1, 50]]
    assert group_lengths([1, 50], 1, 48) == [[1], [50]]


@pytest.mark.gpu
def test_two_batches_are_under_way_on_a_gpu(tmp_path: Path) -> None:
    """Each thread has a stream of its own; vectors are those of one thread."""
    build(tmp_path, "bert")
    engine = load(tmp_path, "float32", torch.device("cuda"))
    items = engine.prepare(EmbedRequest(model="small", texts=texts_of(LENGTHS) * 20))
    cut = cut_by_tokens(256, is_padded=False)

    one, two = (
        Batcher("small", engine.run, cut, n_threads=n).submit(Job(id="job"), items).wait() for n in (1, 2)
    )

    assert np.allclose(one, two, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("dtype", ["float32", "auto", "float16"])
def test_a_gpu_gives_the_same_vectors(tmp_path: Path, kind: str, dtype: str) -> None:
    """On CUDA packed batches give what `encode` gives on the CPU."""
    model = build(tmp_path, kind)
    engine = load(tmp_path, dtype, torch.device("cuda"))
    texts = texts_of(LENGTHS)

    found = embed(engine, texts)

    assert engine.batching == "packed"
    # the probe is held to 0.9999; on these texts a decoder's sharp attention in bfloat16 is not
    close = 0.999 if dtype == "float16" or (kind, dtype) == ("qwen3", "auto") else 0.9999
    assert (found * model.encode(texts, batch_size=1)).sum(axis=1).min() >= close


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_a_gpu_computes_the_bert_family_by_kernels(tmp_path: Path, kind: str) -> None:
    """What settles formats at load takes them there, and torch's modules where there are none."""
    build(tmp_path, kind)

    engine = load(tmp_path, "bfloat16", torch.device("cuda"))

    assert engine.batching == "packed"
    assert isinstance(engine._way, PackedBert) == (kind != "modernbert")
