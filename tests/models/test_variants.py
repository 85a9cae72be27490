"""Each variant of the C encoder that this CPU can run, against torch; tiles also where it has none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name
from transformers import BertConfig, BertModel

from penstock_workers.embedding.bert_c import BertC
from penstock_workers.embedding.c_kernels import (
    HEAD_SIZES,
    VARIANTS,
    Kernels,
    Variant,
    find_kernels,
)
from penstock_workers.embedding.c_library import compiled_path
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.embedding.packed import Packed, PackedBert
from penstock_workers.embedding.probe import MIN_COSINE
from penstock_workers.embedding.row import RowLayout
from penstock_workers.hardware.machine import cpu_flags
from penstock_workers.settings import ModelSettings
from tests.models.test_embedding import cosines
from tests.models.test_packed import CPU, LENGTHS, build, embed, load, packed_way, texts_of, ways

TILES = Variant(
    name="tiles_in_c",
    dtype=torch.bfloat16,
    needs=frozenset.union(*(v.needs for v in VARIANTS if v.name == "avx512_bf16")),
)
"""What is laid out for tiles, and loops instead of their instructions: no CPU is given it."""

pytestmark = pytest.mark.skipif(not compiled_path().exists(), reason="there was no C compiler")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """C computes in processes of one thread, as workers have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[*VARIANTS, TILES], ids=lambda variant: variant.name, scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """A variant, where the CPU can run it."""
    variant: Variant = request.param
    if not variant.needs <= cpu_flags():
        pytest.skip(f"the CPU has no {', '.join(sorted(variant.needs - cpu_flags()))}")
    return Kernels(compiled_path(), variant)


lengths = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 70)), min_size=1, max_size=6)


@given(
    lengths=lengths,
    dim=st.sampled_from(HEAD_SIZES),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 2, 7, 16, 33]),
    is_causal=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
@examples(max_examples=60, deadline=None, derandomize=True)
def test_attention_is_softmax_of_each_text(
    kernels: Kernels,
    lengths: list[int],
    dim: int,
    n_kv_heads: int,
    window: int | None,
    is_causal: bool,
    seed: int,
) -> None:
    """Texts of any length, empty ones too, give what each gives alone."""
    generator = torch.Generator().manual_seed(seed)
    dtype, scale = kernels.variant.dtype, 2.0 * dim**-0.5
    # As a layer's products leave them: queries, keys and values side by side.
    together = torch.randn(sum(lengths), 4 + 2 * n_kv_heads, dim, generator=generator).to(dtype)
    query, key, value = together.split([4, n_kv_heads, n_kv_heads], dim=1)
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)

    found = kernels.attend(
        query, key, value, ends, longest=max(lengths), scale=scale, window=window, is_causal=is_causal
    )

    assert found is not None
    assert found.dtype == dtype
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if start == stop:
            continue
        expected = _attention(query, key, value, slice(start, stop), scale, window, is_causal)
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
        assert torch.allclose(found[start:stop].transpose(0, 1).float(), expected, **close)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, text: slice, scale: float, window: int | None, is_causal: bool
) -> Tensor:
    """Return one text's attention by torch in float32, shape (n_heads, n_tokens, dim)."""
    q, k, v = (states[text].transpose(0, 1).float() for states in (query, key, value))
    length = q.shape[1]
    apart = torch.arange(length)[:, None] - torch.arange(length)
    seen = (apart.abs() < (window or length)) & ((apart >= 0) | (not is_causal))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)


@given(
    lengths=lengths,
    n_heads=st.integers(1, 6),
    head=st.sampled_from(HEAD_SIZES),
    inner=st.integers(1, 60).map(lambda n: 32 * n),
    n_layers=st.integers(1, 2),
    seed=st.integers(0, 1 << 20),
)
@examples(max_examples=25, deadline=None, derandomize=True)
def test_encoders_of_any_width_give_what_torch_gives(
    kernels: Kernels, lengths: list[int], n_heads: int, head: int, inner: int, n_layers: int, seed: int
) -> None:
    """Blocks of inputs, outputs and rows, and what is left over of each, add up to the layer."""
    n_heads += n_heads % 2 if head % 32 else 0  # tiles take 32 inputs at once
    model = _bert(n_heads, n_heads * head, inner, n_layers, seed)
    words = torch.randint(0, 50, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths])
    layout = RowLayout(lengths, CPU)

    with torch.inference_mode():
        found = BertC(model, kernels).hidden({"input_ids": words}, positions, layout)
        texts = [text for text in words.split(lengths) if len(text)]
        alone = [model(input_ids=text[None]).last_hidden_state[0] for text in texts]

    expected = torch.cat([*alone, torch.empty(0, n_heads * head)])
    assert found.shape == expected.shape
    if kernels.variant.dtype == torch.float32:
        assert torch.allclose(found, expected, atol=1e-4)
    elif len(found):
        # A token alone, of narrow random layers: a text's vector is the mean of many, and hides the rounding.
        assert F.cosine_similarity(found, expected, dim=1).min() > 0.99


def _bert(n_heads: int, dim: int, inner: int, n_layers: int, seed: int) -> Any:
    """Return a random BERT whose norms and biases are not those that training begins with."""
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=dim,
            num_attention_heads=n_heads,
            intermediate_size=inner,
            num_hidden_layers=n_layers,
            max_position_embeddings=70,
            initializer_range=2.0 * dim**-0.5,
        )
    ).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "LayerNorm" in name:
            weight.data.add_(0.2 * torch.randn_like(weight))
    return model


def test_weights_lie_in_panels(kernels: Kernels) -> None:
    """A panel's weights for an input, or a pair of them, lie together; zeros stand after the last output."""
    linear = nn.Linear(32, 16 * 5)
    linear.weight.data = torch.arange(32.0 * 80).view(80, 32) % 251  # whole numbers that bfloat16 has
    panel = kernels.panel
    pairs = 1 if kernels.variant.dtype == torch.float32 else 2

    weight, bias = kernels.lay_out([linear])

    assert weight.numel() == 32 * len(bias)
    assert len(bias) % panel == 0
    flat = weight.flatten().float()
    for of, to in [(0, 0), (1, 0), (0, 1), (5, 17), (31, 79), (30, 64)]:  # inputs and outputs
        at = to // panel * panel * 32 + of // pairs * panel * pairs + to % panel * pairs + of % pairs
        assert flat[at] == linear.weight[to, of]
    assert bias[80:].eq(0).all()
    assert flat.count_nonzero() == linear.weight.count_nonzero()


@pytest.mark.parametrize("width", [24, 40])
def test_unusual_widths_are_refused(kernels: Kernels, width: int) -> None:
    """What would be read past a row's end is not computed."""
    for linear in (nn.Linear(width, 32), nn.Linear(32, width)):
        with pytest.raises(NotImplementedError, match="widths"):
            kernels.lay_out([linear])


@pytest.mark.parametrize("kind", ["bert", "bert-cls", "roberta", "xlm-roberta"])
def test_models_keep_their_vectors(tmp_path: Path, kernels: Kernels, kind: str) -> None:
    """A whole model by each variant, batch mates included: texts alone give the same bits."""
    build(tmp_path, kind)
    engine, texts = load(tmp_path), texts_of(LENGTHS)
    expected = embed(engine, texts)

    engine._way = PackedBert(packed_way(engine), lambda transformer: BertC(transformer, kernels))

    found = embed(engine, texts)
    assert cosines(found, expected).min() >= (0.999999 if engine.dtype == "float32" else MIN_COSINE)
    for i, text in enumerate(texts):
        assert np.array_equal(embed(engine, [text])[0], found[i])


def test_activations_are_gelu(kernels: Kernels) -> None:
    """From far below zero to far above, to the precision of the variant."""
    model = _bert(2, 64, 128, 1, 0)
    layer = model.encoder.layer[0]
    layer.intermediate.dense.weight.data.mul_(40)
    words, layout = torch.arange(50), RowLayout([50], CPU)

    with torch.inference_mode():
        found = BertC(model, kernels).hidden({"input_ids": words}, torch.arange(50), layout)
        expected = model(input_ids=words[None]).last_hidden_state[0]

    close = 1e-4 if kernels.variant.dtype == torch.float32 else 0.2
    assert torch.allclose(found, expected, atol=close)


def test_a_cpu_may_be_used_as_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PENSTOCK_CPU` leaves out the variants that are beyond a kind."""
    kinds = {"avx2": "avx2", "avx512": "avx512", "avx512_bf16": "avx512"}
    for kind, float32 in kinds.items():
        monkeypatch.setenv("PENSTOCK_CPU", kind)
        for dtype, name in ((torch.float32, float32), (torch.bfloat16, "avx512_bf16")):
            found = find_kernels(CPU, dtype)
            is_there = next(v for v in VARIANTS if v.name == name).needs <= cpu_flags()
            assert (found and found.variant.name) == (name if is_there else None)


def test_the_faster_encoder_in_float32_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's or ours, whichever it was; the race is run once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PENSTOCK_CPU", "avx2")
    if find_kernels(CPU, torch.float32) is None:
        pytest.skip("the CPU has no AVX2")
    build(tmp_path, "bert")
    settings = ModelSettings(task="embed", source=str(tmp_path / "model"), engine="torch")
    Embedder.load("small", settings, CPU)
    (file,) = (tmp_path / "penstock" / "measured").iterdir()
    kept = json.loads(file.read_text())
    assert kept["choices"]["dtype"] == "float32"

    for winner, way in (("C", PackedBert), ("torch", Packed)):
        kept["choices"]["products"] = winner
        file.write_text(json.dumps(kept))
        engine = Embedder.load("small", settings, CPU)
        assert isinstance(engine._way, way)
        assert engine.dtype == "float32"


def test_an_encoder_in_float32_that_only_seems_plain_is_found_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Code that somebody hung on a layer is not in C: the probe tells, and torch computes."""
    if find_kernels(CPU, torch.float32) is None:
        pytest.skip("the CPU has no AVX2")
    build(tmp_path, "bert")
    engine = load(tmp_path)
    layer = packed_way(engine).transformer.encoder.layer[0]
    layer.output.register_forward_hook(lambda _module, _states, found: found.flip(-1))

    way, products = ways(engine).fuse(engine._way, {})

    assert products == "torch"
    assert way is engine._way
    assert "float32 in C is not used: packed vectors differ" in caplog.text
