"""Vectors against sentence-transformers' own `encode`, and models of other kinds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

from penstock.errors import EngineError, InvalidOptionError, OutOfMemoryError
from penstock.request import EmbedRequest
from penstock_workers.batching.batcher import Batcher
from penstock_workers.batching.cuts import cut_by_tokens
from penstock_workers.batching.feed import Job
from penstock_workers.bundled import bundled_folder
from penstock_workers.embedding import embedder
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.embedding.probe import MIN_COSINE
from penstock_workers.serving.formats import form
from penstock_workers.settings import ModelSettings

CPU = torch.device("cpu")
SCRIPTS = (
    "The gate feeds the turbine with water from the lake above.",
    "Der Schütz regelt den Zufluss; größer heißt schneller.",
    "Вода падает по трубе и вращает турбину.",
    "水は管を通ってタービンを回す。",
    "压力管道把水送到水轮机。",
    "المياه تدير التوربين",
    "पानी टरबाइन को घुमाता है",
    "def feed(turbine, gate):\n    return turbine(gate)  # 🙂",
)


def corpus(n_texts: int = 256) -> list[str]:
    """Texts of 1 to over 256 tokens in several scripts, with duplicates."""
    rng = np.random.default_rng(7)
    texts = ["a", "?", "", " ", "\x00"]
    while len(texts) < n_texts - 8:
        parts = rng.choice(SCRIPTS, size=int(rng.integers(1, 3)))
        words = " ".join(parts).split()
        n_words = int(rng.choice([1, 3, 10, 30, 120, 400]))
        texts.append(" ".join(rng.choice(words, size=n_words)))
    return texts + texts[:8]


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of each row of `a` with the row of `b`, shape (n,)."""
    return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def embed(engine: Embedder, texts: list[str], n_threads: int = 1, **options: object) -> NDArray[np.float32]:
    """Embed as a worker does, in batches; shape (n_texts, dim)."""
    request = EmbedRequest.parse({"model": engine.name, "texts": texts, **options})
    batcher = Batcher(engine.name, engine.run, cut_by_tokens(4096), n_threads=n_threads)
    vectors = batcher.submit(Job(id="job"), engine.prepare(request)).wait()
    rows = np.stack(vectors) if vectors else np.zeros((0, engine.dim), dtype=np.float32)
    return form(rows, request, engine.int8_ranges)  # type: ignore[return-value]  # float32 was asked for


@pytest.fixture(scope="module")
def reference() -> NDArray[np.float32]:
    """What `encode` gives for the corpus in float32, shape (256, 384)."""
    model = SentenceTransformer(str(bundled_folder("minilm")), device="cpu")
    return model.encode(corpus(), batch_size=32)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_vectors_are_those_of_encode(reference: NDArray[np.float32], dtype: str) -> None:
    """Cosine to `encode` is at least 0.9999 for every text, alone and in a batch."""
    settings = ModelSettings(task="embed", source="bundled:minilm", dtype=dtype)  # type: ignore[arg-type]
    engine = Embedder.load("minilm", settings, CPU)

    together = embed(engine, corpus())
    alone = np.concatenate([embed(engine, [text]) for text in corpus()[:64]])

    assert cosines(together, reference).min() >= MIN_COSINE
    assert cosines(alone, reference[:64]).min() >= MIN_COSINE


class Folder:
    """A tiny random sentence-transformers model on disk."""

    def __init__(self, path: Path, *, normalize: bool = True, include_prompt: bool = True) -> None:
        words = sorted({word for text in SCRIPTS for word in text.lower().split()})
        (path / "vocab.txt").write_text(
            "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, "query", ":"])
        )
        tokenizer = BertTokenizerFast(str(path / "vocab.txt"))
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.5,
        )
        BertModel(config).save_pretrained(path / "bert")
        tokenizer.save_pretrained(path / "bert")
        modules: list[torch.nn.Module] = [Transformer(str(path / "bert"), max_seq_length=48)]
        modules.append(Pooling(32, pooling_mode="mean", include_prompt=include_prompt))
        if normalize:
            modules.append(Normalize())
        self.model = SentenceTransformer(
            modules=modules, device="cpu", prompts={"query": "query : ", "document": ""}
        )
        self.path = path / "model"
        self.model.save_pretrained(str(self.path))

    def load(self, dtype: str = "auto") -> Embedder:
        """Load it as a worker does."""
        settings = {"task": "embed", "source": str(self.path), "engine": "torch", "dtype": dtype}
        return Embedder.load("tiny", ModelSettings.model_validate(settings), CPU)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_models_own_modules_decide(tmp_path: Path, normalize: bool) -> None:
    """Pooling and normalisation are the model's; `normalize_embeddings` adds unit length."""
    folder = Folder(tmp_path, normalize=normalize)
    engine = folder.load("float32")

    plain, unit = embed(engine, list(SCRIPTS)), embed(engine, list(SCRIPTS), normalize_embeddings=True)

    assert np.allclose(plain, folder.model.encode(list(SCRIPTS)), atol=1e-5)
    assert np.allclose(unit, folder.model.encode(list(SCRIPTS), normalize_embeddings=True), atol=1e-5)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_are_the_models_own(tmp_path: Path, include_prompt: bool) -> None:
    """`prompt_name` and `prompt` do what they do in `encode`, also in a batch with other prompts."""
    folder = Folder(tmp_path, include_prompt=include_prompt)
    engine = folder.load("float32")
    texts = list(SCRIPTS)
    named, plain = (
        engine.prepare(EmbedRequest(model="tiny", texts=texts, prompt_name=name)) for name in ("query", None)
    )

    mixed = dict(engine.run([*named, *plain]))

    expected = [folder.model.encode(texts, prompt_name="query"), folder.model.encode(texts)]
    assert np.allclose(np.stack([mixed[i] for i in range(16)]), np.concatenate(expected), atol=1e-5)
    assert np.allclose(
        embed(engine, texts, prompt="query : "), folder.model.encode(texts, prompt="query : "), atol=1e-5
    )
    with pytest.raises(InvalidOptionError, match="prompts here: document, query"):
        engine.prepare(EmbedRequest(model="tiny", texts=texts, prompt_name="nope"))


def test_matryoshka_dimensions_are_those_of_encode(tmp_path: Path) -> None:
    """`truncate_dim` cuts as `encode` does: before a normalisation that the call asks for."""
    folder = Folder(tmp_path, normalize=False)
    engine = folder.load("float32")

    cut = embed(engine, list(SCRIPTS), truncate_dim=8, normalize_embeddings=True)

    expected = folder.model.encode(list(SCRIPTS), truncate_dim=8, normalize_embeddings=True)
    assert np.allclose(cut, expected, atol=1e-5)


def test_broken_weights_never_leave_the_worker(tmp_path: Path) -> None:
    """A vector that is not finite is an error for its own job alone."""
    folder = Folder(tmp_path, normalize=False)
    engine = folder.load("float32")
    with torch.no_grad():
        engine._model[0].auto_model.embeddings.word_embeddings.weight[5] = torch.nan
    first_word = engine._model.tokenizer.convert_ids_to_tokens(5)
    batcher = Batcher("tiny", engine.run, cut_by_tokens(4096))

    works = [
        batcher.submit(Job(id=text), engine.prepare(EmbedRequest(model="tiny", texts=[text])))
        for text in (first_word, SCRIPTS[2])
    ]

    with pytest.raises(EngineError, match="not finite"):
        works[0].wait()
    assert np.isfinite(works[1].wait()[0]).all()


def test_two_threads_give_what_one_gives(tmp_path: Path) -> None:
    """As on a GPU, where two batches of one engine are under way."""
    engine = Folder(tmp_path).load("float32")
    texts = corpus()

    one, two = embed(engine, texts), embed(engine, texts, n_threads=2)

    assert np.allclose(one, two, atol=1e-5)


def test_a_format_that_turns_vectors_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where bfloat16 loses the vectors' directions, `auto` takes float32 and says so."""
    folder = Folder(tmp_path)
    state = folder.model[0].auto_model.state_dict()
    for name, tensor in state.items():  # weights so large that rounding flips the softmax
        if "query.weight" in name or "key.weight" in name:
            tensor.mul_(30)
    folder.model.save_pretrained(str(folder.path))

    engine = folder.load("auto")

    assert engine.dtype == "float32"
    if torch.cpu._is_avx512_bf16_supported():
        assert "float32 is used, not bfloat16: packed vectors differ" in caplog.text
    assert np.allclose(embed(engine, list(SCRIPTS)), folder.model.encode(list(SCRIPTS)), atol=1e-4)


def test_the_size_of_batches_is_learned_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device is nearly as fast with is enough; where nothing fits, the smallest is taken."""
    settings = ModelSettings(task="embed", source="bundled:minilm", engine="torch")
    engine = Embedder.load("minilm", settings, CPU)
    monkeypatch.setattr(embedder, "BATCH_TOKENS", (128, 256, 512))
    n_tokens, seconds = engine.learn_batch_tokens()
    assert n_tokens in (128, 256, 512)
    assert seconds is not None
    assert 0 < seconds < 60

    def too_much(*_: object) -> None:
        raise OutOfMemoryError("minilm", 1)

    monkeypatch.setattr(engine, "_compute", too_much)
    assert engine.learn_batch_tokens() == (128, None)
