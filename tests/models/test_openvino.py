"""A model as an OpenVINO graph: the same vectors, or torch's."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor, nn

from penstock.errors import ModelLoadError
from penstock.request import EmbedRequest
from penstock_workers.batching.batcher import Batcher
from penstock_workers.batching.cuts import cut_by_tokens
from penstock_workers.batching.feed import Job
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.embedding.openvino import Graph
from penstock_workers.embedding.probe import MIN_COSINE
from penstock_workers.settings import ModelSettings
from tests.models.test_embedding import cosines
from tests.models.test_packed import CPU, LENGTHS, PACKED, build, texts_of

pytest.importorskip("openvino")


def load(path: Path, engine: str = "openvino", dtype: str = "float32") -> Embedder:
    """Load it as a worker does."""
    settings = {"task": "embed", "source": str(path / "model"), "engine": engine, "dtype": dtype}
    return Embedder.load("small", ModelSettings.model_validate(settings), CPU)


def embed(engine: Embedder, texts: list[str], max_tokens: int = 1024) -> NDArray[np.float32]:
    """Embed as a worker does, in padded batches; shape (n_texts, dim)."""
    batcher = Batcher(engine.name, engine.run, cut_by_tokens(max_tokens))
    prepared = engine.prepare(EmbedRequest(model="small", texts=texts))
    return np.stack(batcher.submit(Job(id="job"), prepared).wait())


# Beyond its window ModernBERT's padding sees no token, which is not a number in the graph.
@pytest.mark.parametrize("kind", [*(kind for kind in PACKED if kind != "modernbert"), "mpnet"])
def test_vectors_are_those_of_encode(tmp_path: Path, kind: str) -> None:
    """Alone and in padded batches, a text's vector is the one that `encode` gives it."""
    model = build(tmp_path, kind)
    engine = load(tmp_path)
    texts = texts_of(LENGTHS)
    expected = model.encode(texts, batch_size=1)

    assert (engine.batching, engine.dtype, engine.is_padded) == ("padded, OpenVINO", "float32", True)
    assert np.allclose(embed(engine, texts), expected, atol=1e-4)
    assert np.allclose(embed(engine, texts, max_tokens=1), expected, atol=1e-4)


def test_vectors_outlive_the_next_batch(tmp_path: Path) -> None:
    """A vector that is a piece of the graph's output is not overwritten by the batch after."""
    build(tmp_path, "bert-cls")
    engine = load(tmp_path)
    assert isinstance(engine._way, Graph)
    engine._way._modules.pop()  # pooling alone gives a view
    first, second = (engine.prepare(EmbedRequest(model="small", texts=[text])) for text in ("gate", "lake"))

    ((_, found),) = engine.run(first)
    before = found.copy()  # type: ignore[union-attr]
    list(engine.run(second))

    assert np.array_equal(found, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_model_keeps_its_directions(dtype: str) -> None:
    """In both formats vectors have the cosine to torch's float32 that is asked of every way."""
    texts = [" ".join(["the pipe feeds a turbine"] * n) for n in (1, 2, 3, 5, 9, 20, 40, 60)]
    found = {}
    for engine, of in (("torch", "float32"), ("openvino", dtype)):
        settings = ModelSettings.model_validate(
            {"task": "embed", "source": "bundled:minilm", "engine": engine, "dtype": of}
        )
        loaded = Embedder.load("small", settings, CPU)
        assert loaded.dtype == of
        found[engine] = embed(loaded, texts)

    assert cosines(found["torch"], found["openvino"]).min() >= MIN_COSINE


def test_the_faster_one_is_taken_whole(tmp_path: Path) -> None:
    """Whoever wins the race, vectors are right, and what torch laid out for itself is in use or undone."""
    model = build(tmp_path, "bert")
    engine = load(tmp_path, "auto")
    texts = texts_of(LENGTHS)

    has_graph = engine.batching == "padded, OpenVINO"
    attention = engine._model[0].auto_model.config._attn_implementation
    assert attention == ("sdpa" if has_graph else "penstock_packed")
    assert np.allclose(embed(engine, texts), model.encode(texts, batch_size=1), atol=1e-4)


class Smear(nn.Module):
    """Mixes batch mates."""

    def forward(self, states: Tensor) -> Tensor:
        """Add to each text another's states."""
        return states + states.roll(1, dims=0)


def test_what_cannot_be_compiled_is_left_to_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A graph that fails or mixes texts is not used: a warning, or an error if the settings insist."""
    build(tmp_path, "bert")
    for broken, reason in ((Smear(), "vectors differ"), (nn.Bilinear(1, 1, 1), "RuntimeError")):
        model = load(tmp_path, "torch")._model
        engine = Embedder("small", model)
        probe = engine._embed_probe()
        model[0].auto_model.embeddings.dropout = broken
        for name in ("auto", "openvino"):
            settings = ModelSettings.model_validate({"task": "embed", "source": "here", "engine": name})
            ways = engine._ways(settings, probe)
            caplog.clear()
            if name == "auto":
                assert ways.trace(is_bfloat16=False) is None
                assert "torch computes: OpenVINO: " in caplog.text
                assert reason in caplog.text
            else:
                with pytest.raises(ModelLoadError, match=f"OpenVINO: .*{reason}"):
                    ways.trace(is_bfloat16=False)
        assert engine.batching == "padded"


def test_modernbert_is_left_to_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the probe finds wrong with a real architecture is told, and torch serves it."""
    build(tmp_path, "modernbert")

    assert load(tmp_path, "auto").batching == "packed"
    assert "torch computes: OpenVINO: padded, OpenVINO vectors differ" in caplog.text


def test_formats_that_it_lacks_are_refused(tmp_path: Path) -> None:
    """Half precision is torch's alone."""
    build(tmp_path, "bert")

    with pytest.raises(ModelLoadError, match="float32 or bfloat16"):
        load(tmp_path, dtype="float16")
    assert load(tmp_path, "auto", "float16").batching == "packed"
