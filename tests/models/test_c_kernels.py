"""What is computed in C: what torch computes, sooner."""

import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  its usual name

from penstock.request import EmbedRequest
from penstock_workers.embedding import c_kernels, c_library
from penstock_workers.embedding.attention import _attend, packed
from penstock_workers.embedding.bert_c import BertC
from penstock_workers.embedding.bfloat16 import Bfloat16, use_bfloat16
from penstock_workers.embedding.c_kernels import VARIANTS, Kernels, find_kernels
from penstock_workers.embedding.c_library import compiled_path
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.embedding.packed import PackedBert
from penstock_workers.embedding.probe import MIN_COSINE
from penstock_workers.embedding.row import RowLayout
from penstock_workers.hardware.machine import cpu_flags
from penstock_workers.settings import ModelSettings
from tests.models.test_embedding import cosines
from tests.models.test_packed import CPU, LENGTHS, PACKED, build, embed, load, packed_way, texts_of, ways

BERT_KINDS = ("bert", "bert-cls", "roberta", "xlm-roberta")

needs_avx512 = pytest.mark.skipif("avx512_bf16" not in cpu_flags(), reason="the CPU has no AVX-512 BF16")


def in_c(engine: Embedder, kernels: Kernels) -> PackedBert:
    """Have a model that is packed by torch computed in C."""
    return PackedBert(packed_way(engine), partial(BertC, kernels=kernels))


@needs_avx512
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_an_install_compiles_them() -> None:
    """Where there are a C compiler and the CPU, the package has them, from the source as it is now."""
    assert compiled_path().exists()


def test_a_library_that_is_missing_is_told(tmp_path: Path) -> None:
    """What was not compiled is an error of the system, which makes torch compute."""
    with pytest.raises(OSError, match="missing"):
        Kernels(tmp_path / "missing.so", VARIANTS[-1])


def test_an_install_without_it_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker's log says what it costs and what to do, however many models ask."""
    monkeypatch.setattr(c_library, "cpu_flags", lambda: {"avx2", "fma"})
    monkeypatch.setattr(c_kernels, "compiled_path", lambda: tmp_path / "kernels-0.so")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    c_kernels._choose.cache_clear()
    try:
        assert [find_kernels(CPU, torch.float32) for _ in range(2)] == [None, None]
    finally:
        c_kernels._choose.cache_clear()
        torch.set_num_threads(threads)

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "1.4 times as long" in record.getMessage()
    assert "install its wheel for Linux on x86-64" in record.getMessage()
    assert "kernels-0.so" in record.getMessage()


def test_several_threads_are_left_to_torch(kernels: Kernels) -> None:
    """A process whose products have two threads shares attention out too."""
    torch.set_num_threads(2)
    assert find_kernels(CPU, torch.bfloat16) is None
    torch.set_num_threads(1)
    assert find_kernels(CPU, torch.bfloat16) is kernels


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize("dim", [16, 32, 48, 64, 80, 96, 128])
def test_attention_is_softmax_of_each_text(
    kernels: Kernels, dim: int, n_kv_heads: int, is_causal: bool, window: int | None
) -> None:
    """Texts of any length, one by one in float32, give the same to the 8 bits of bfloat16."""
    torch.manual_seed(0)
    lengths = [1, 2, 3, 15, 16, 17, 33, 100, 7]
    heads = [torch.randn(1, n, sum(lengths), dim).bfloat16() for n in (4, n_kv_heads, n_kv_heads)]
    scale = 2.0 * dim**-0.5

    with torch.inference_mode(), packed(RowLayout(lengths, CPU)) as layout:
        found, _ = _attend(
            nn.Module(), *heads, None, scaling=scale, is_causal=is_causal, sliding_window=window
        )

    assert "rectangles" not in layout.__dict__  # torch would have cut some
    start = 0
    for length in lengths:
        q, k, v = (states[0, :, start : start + length].float() for states in heads)
        apart = torch.arange(length)[:, None] - torch.arange(length)
        seen = (apart.abs() < (window or length)) & ((apart >= 0) | (not is_causal))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        assert torch.allclose(
            found[0, start : start + length].transpose(0, 1).float(), expected, atol=0.02, rtol=0.01
        )
        start += length


def test_heads_of_other_sizes_are_left_to_torch(kernels: Kernels) -> None:
    """There is code for the usual sizes."""
    heads = [torch.randn(5, 2, 24).bfloat16() for _ in range(3)]
    ends = torch.tensor([0, 5], dtype=torch.int32)

    assert kernels.attend(*heads, ends, longest=5, scale=1.0, window=None, is_causal=False) is None


def test_no_score_is_too_large(kernels: Kernels) -> None:
    """The largest score of a query is taken away first, so that nothing overflows."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(40, 2, 32).bfloat16() for _ in range(3))
    ends = torch.tensor([0, 40], dtype=torch.int32)

    found = kernels.attend(query, key, value, ends, longest=40, scale=1000.0, window=None, is_causal=False)

    assert found is not None
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double())
    best = scores.argmax(-1)  # (n_heads, n_tokens)
    expected = torch.stack([value[best[head], head] for head in range(2)], dim=1)
    clear = (scores.topk(2).values.diff().abs().squeeze(-1) > 0.05).T  # no other comes near
    assert torch.equal(found[clear], expected[clear])


def test_what_is_not_finite_stays_so(kernels: Kernels) -> None:
    """A text that the model cannot compute is not made up; its batch mate is not touched."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(20, 2, 32).bfloat16() for _ in range(3))
    query[3] = key[3] = value[3] = torch.nan
    ends = torch.tensor([0, 10, 20], dtype=torch.int32)

    found = kernels.attend(query, key, value, ends, longest=10, scale=1.0, window=None, is_causal=False)

    assert found is not None
    assert found[:10].isnan().all()
    assert found[10:].isfinite().all()


def test_the_bundled_model_keeps_its_directions(kernels: Kernels) -> None:
    """With all of it in use, vectors are those of the model in float32."""
    settings = ModelSettings(task="embed", source="bundled:minilm", engine="torch", dtype="float32")
    torch.set_num_threads(2)  # by one thread C would compute float32 too
    quick, plain = (Embedder.load("minilm", settings, CPU) for _ in range(2))
    torch.set_num_threads(1)
    quick._way = in_c(quick, kernels)
    request = EmbedRequest(model="minilm", texts=[*texts_of(LENGTHS), "a", "1 2 3", "naïve café " * 90])

    vectors = [np.stack([v for _, v in sorted(e.run(e.prepare(request)))]) for e in (quick, plain)]

    assert quick.dtype == "bfloat16"
    assert cosines(*vectors).min() >= MIN_COSINE


@pytest.mark.parametrize("kind", BERT_KINDS)
def test_a_bert_encoder_gives_what_its_modules_give(tmp_path: Path, kernels: Kernels, kind: str) -> None:
    """The BERT family without its modules: the same vectors, positions and types included."""
    build(tmp_path, kind)
    engine, texts = load(tmp_path), texts_of(LENGTHS)
    packed_by_torch = engine._way
    expected = embed(engine, texts)

    engine._way = in_c(engine, kernels)

    found = embed(engine, texts)
    assert cosines(found, expected).min() >= MIN_COSINE
    assert not np.array_equal(found, expected)  # bfloat16
    for i, text in enumerate(texts):
        assert np.array_equal(embed(engine, [text])[0], found[i])
    engine._way.close()
    engine._way = packed_by_torch
    assert np.array_equal(embed(engine, texts), expected)


@pytest.mark.parametrize("n_texts", [1, 2, 3, 4, 5, 6, 7, 40])
def test_every_number_of_tokens_has_its_vectors(tmp_path: Path, kernels: Kernels, n_texts: int) -> None:
    """Products are computed for some tokens at once; what is left over is computed too."""
    build(tmp_path, "bert")
    engine = load(tmp_path)
    texts = texts_of([1 + i % 17 for i in range(n_texts)])
    expected = embed(engine, texts)

    engine._way = in_c(engine, kernels)

    assert cosines(embed(engine, texts), expected).min() >= MIN_COSINE


def test_activations_of_any_size_are_gelu(tmp_path: Path, kernels: Kernels) -> None:
    """Far from zero, where the polynomial ends, GELU is 0 or the number itself."""
    build(tmp_path, "bert")
    engine, texts = load(tmp_path), texts_of(LENGTHS)
    for layer in packed_way(engine).transformer.encoder.layer:
        layer.intermediate.dense.weight.data.mul_(100)
    expected = embed(engine, texts)

    engine._way = in_c(engine, kernels)

    assert cosines(embed(engine, texts), expected).min() >= MIN_COSINE


@pytest.mark.parametrize("which", ["words", "positions", "types"])
@pytest.mark.parametrize("is_below", [False, True])
def test_what_is_in_no_table_is_an_error(
    tmp_path: Path, kernels: Kernels, which: str, is_below: bool
) -> None:
    """It is not looked up in somebody's memory."""
    build(tmp_path, "bert")
    engine = load(tmp_path)
    encoder, layout = BertC(packed_way(engine).transformer, kernels), RowLayout([3], CPU)
    indices = {name: torch.zeros(3, dtype=torch.int64) for name in ("words", "positions", "types")}
    table = ("words", "positions", "types").index(which)
    indices[which][1] = -1 if is_below else encoder._encoder.n_entries[table]
    row = {"input_ids": indices["words"], "token_type_ids": indices["types"]}

    with pytest.raises(IndexError, match="not in its table"):
        encoder.hidden(row, indices["positions"], layout)


@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
def test_other_encoders_keep_their_modules(tmp_path: Path, kernels: Kernels, kind: str) -> None:
    """What is built differently is refused and works as before."""
    build(tmp_path, kind)
    engine, texts = load(tmp_path), texts_of(LENGTHS)
    before = embed(engine, texts)

    with pytest.raises(NotImplementedError):
        in_c(engine, kernels)

    assert np.array_equal(embed(engine, texts), before)


@pytest.mark.parametrize("change", ["relu", "bfloat16", "heads"])
def test_a_bert_of_another_kind_keeps_its_modules(tmp_path: Path, kernels: Kernels, change: str) -> None:
    """There is C for GELU, for float32 to begin with, and for usual heads."""
    build(tmp_path, "bert")
    engine = load(tmp_path)
    transformer = packed_way(engine).transformer
    if change == "relu":
        transformer.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()
    elif change == "bfloat16":
        use_bfloat16(engine._model)
    else:
        transformer.config.num_attention_heads = 8

    with pytest.raises(NotImplementedError):
        in_c(engine, kernels)


@pytest.mark.usefixtures("kernels")
def test_an_encoder_that_only_seems_plain_is_found_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Code that somebody hung on a layer is not in C: the probe tells, the log says so, modules compute."""
    build(tmp_path, "bert")
    engine = load(tmp_path)
    layer = packed_way(engine).transformer.encoder.layer[0]
    layer.output.register_forward_hook(lambda _module, _states, found: found.flip(-1))

    way, products = ways(engine, "bfloat16").reduce(engine._way, {})

    assert products == "torch"
    assert isinstance(way, Bfloat16)
    assert "a way to bfloat16 is not used: packed vectors differ" in caplog.text


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", PACKED)
def test_a_text_never_sees_its_batch_mates(tmp_path: Path, kind: str) -> None:
    """Other words around a text change no bit of its vector."""
    build(tmp_path, kind)
    engine = load(tmp_path)
    known = {"products": "C" if kind in BERT_KINDS else "torch"}
    engine._way, products = ways(engine, "bfloat16").reduce(engine._way, known)
    assert products == known["products"]
    texts, others = texts_of(LENGTHS), texts_of(LENGTHS, seed=1)
    mixed = [text if i % 2 else other for i, (text, other) in enumerate(zip(texts, others, strict=True))]

    assert np.array_equal(embed(engine, texts)[1::2], embed(engine, mixed)[1::2])


def test_threads_may_call_at_once(kernels: Kernels) -> None:
    """Engines of one process compute beside each other: nothing is shared between two calls."""
    torch.manual_seed(0)
    heads = [torch.randn(600, 4, 32).bfloat16() for _ in range(3)]
    ends = torch.tensor([0, 90, 600], dtype=torch.int32)
    expected = kernels.attend(*heads, ends, longest=510, scale=1.0, window=None, is_causal=False)
    assert expected is not None
    differ: list[int] = []

    def call(number: int) -> None:
        for _ in range(20):
            found = kernels.attend(*heads, ends, longest=510, scale=1.0, window=None, is_causal=False)
            if found is None or not torch.equal(found, expected):
                differ.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert not differ
