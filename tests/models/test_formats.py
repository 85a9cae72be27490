"""The forms of vectors against sentence-transformers' own quantization."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers.util.quantization import quantize_embeddings

from penstock.errors import InvalidOptionError, ModelLoadError
from penstock.request import EmbedRequest, Precision
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.embedding.int8_ranges import choose_ranges, read_ranges
from penstock_workers.embedding.probe import PROBE
from penstock_workers.serving.formats import form, row_bytes
from penstock_workers.settings import ModelSettings
from tests.models.test_embedding import SCRIPTS, Folder, embed

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8", "binary", "ubinary")
DIM = 44


def rows(n_texts: int = 300, seed: int = 5) -> NDArray[np.float32]:
    """Vectors of any length, with zeros; float32, shape (n_texts, DIM)."""
    vectors = np.random.default_rng(seed).standard_normal((n_texts, DIM)).astype(np.float32)
    vectors[:, 3] *= 30
    vectors[::7, 5] = 0
    return vectors


def request(precision: Precision, **options: object) -> EmbedRequest:
    return EmbedRequest.parse({"model": "m", "texts": [], "precision": precision, **options})


@pytest.mark.parametrize("n_texts", [0, 1, 300])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dim", [None, 1, 8, 21])
@pytest.mark.parametrize("precision", ["int8", "binary", "ubinary"])
def test_vectors_are_quantized_as_by_sentence_transformers(
    precision: Precision, dim: int | None, normalize: bool, n_texts: int
) -> None:
    """Cut, then normalised, then quantised: element for element what its function gives."""
    ranges = np.stack([rows(seed=1).min(axis=0), rows(seed=1).max(axis=0)])
    ranges[:, 7] = 0.5  # a dimension that never changes
    asked = request(precision, truncate_dim=dim, normalize_embeddings=normalize)

    found = form(rows(n_texts), asked, ranges)

    plain = rows(n_texts)[:, :dim]
    if normalize:
        plain = torch.nn.functional.normalize(torch.from_numpy(plain), dim=1).numpy()
    expected = quantize_embeddings(plain, precision, ranges=ranges[:, :dim])
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.flags.c_contiguous
    # at a step's edge, the last bit of a norm decides
    assert (found != expected).sum() <= (found.size * 1e-3 if normalize else 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dim", [None, 1, 9, 16])
def test_a_row_s_size_is_known_before_it_is_computed(precision: Precision, dim: int | None) -> None:
    """What the limit of a result is checked with is what the result takes."""
    asked = request(precision, truncate_dim=dim)

    assert form(rows(10), asked, choose_ranges(rows())).nbytes == 10 * row_bytes(DIM, asked)


@pytest.mark.parametrize("dim", [None, 11])
def test_the_models_own_range_keeps_directions(dim: int | None) -> None:
    """Without configured ranges, int8 vectors of unit length can be turned back as `ModelInfo` says."""
    probe, vectors = rows(seed=2)[:, 4:], rows()[:, 4:]  # without the dimension that is far larger
    ranges = choose_ranges(probe)

    found = form(vectors, request("int8", truncate_dim=dim, normalize_embeddings=True), ranges)

    low, high = ranges * (np.sqrt(vectors.shape[1] / dim) if dim else 1)
    back = low + (found + 128.5) * (high - low) / 255
    plain = vectors[:, :dim]
    cosines = (back * plain).sum(axis=1) / np.linalg.norm(back, axis=1) / np.linalg.norm(plain, axis=1)
    assert ranges.shape == (2, 1)
    assert np.log2(ranges[1, 0]) % 1 == 0
    assert cosines.min() > 0.999


def test_int8_does_not_depend_on_batch_mates(tmp_path: Path) -> None:
    """A text's int8 vector is the same alone and among others, and near the model's float32."""
    engine = Folder(tmp_path).load("float32")

    together, alone = (embed(engine, texts, precision="int8") for texts in (list(SCRIPTS), [SCRIPTS[3]]))

    assert together.dtype == np.int8
    assert np.abs(together[3].astype(int) - alone[0]).max() <= 1  # products round by the batch's shape
    assert engine.int8_ranges is not None
    low, high = engine.int8_ranges
    back = low + (together + 128.5) * (high - low) / 255
    assert np.allclose(back, embed(engine, list(SCRIPTS)), atol=(high - low).max() / 255)


def test_int8_needs_a_range_that_holds(tmp_path: Path) -> None:
    """Vectors of any length have no range of their own: the call normalises them, or a file names it."""
    folder = Folder(tmp_path, normalize=False)
    engine = folder.load("float32")
    vectors = embed(engine, list(PROBE))
    np.save(tmp_path / "ranges.npy", np.stack([vectors.min(axis=0), vectors.max(axis=0)]))
    settings = ModelSettings(
        task="embed", source=str(folder.path), dtype="float32", int8_ranges=tmp_path / "ranges.npy"
    )
    calibrated = Embedder.load("tiny", settings, torch.device("cpu"))

    with pytest.raises(InvalidOptionError, match=r"precision is 'int8'; .*normalize_embeddings"):
        engine.prepare(request("int8"))
    assert embed(engine, ["a"], precision="int8", normalize_embeddings=True).dtype == np.int8
    found = embed(calibrated, list(PROBE), precision="int8")
    assert (found.min(), found.max()) == (-128, 127)


@pytest.mark.parametrize(
    ("ranges", "problem"),
    [
        (np.zeros((2, 31)), r"shape \(2, 32\) is wanted"),
        (np.zeros((2, 32), dtype=np.int8), "array of floats"),
        (np.array([[1.0] * 32, [0.0] * 32]), "lowest values"),
        (np.full((2, 32), np.nan), "finite"),
        (np.array([[None] * 32] * 2), "allow_pickle"),
    ],
)
def test_ranges_of_another_model_are_refused(
    tmp_path: Path, ranges: NDArray[np.float64], problem: str
) -> None:
    """A file that does not fit stops the load in one line."""
    np.save(tmp_path / "ranges.npy", ranges, allow_pickle=True)

    with pytest.raises(ValueError, match=problem):
        read_ranges(tmp_path / "ranges.npy", 32)


def test_a_missing_file_of_ranges_stops_the_load(tmp_path: Path) -> None:
    """The model is not served with other ranges than those that were asked for."""
    settings = ModelSettings(
        task="embed", source=str(Folder(tmp_path).path), int8_ranges=tmp_path / "nowhere.npy"
    )

    with pytest.raises(ModelLoadError, match=r"int8_ranges: .*nowhere"):
        Embedder.load("tiny", settings, torch.device("cpu"))
