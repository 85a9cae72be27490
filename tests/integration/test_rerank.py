"""Documents in order of how well they answer a query, through a real worker and a small cross-encoder."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from penstock import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    InvalidOptionError,
    InvalidTextError,
    JobState,
    TooManyTextsError,
    WrongTaskError,
)
from penstock.adapters.lightrag import LightRAGModels
from penstock_workers.bundled import bundled_folder
from tests.deployment import Server, WorkerProcess

QUERY = "What feeds the turbine?"
DOCUMENTS = ["A penstock feeds a turbine.", "你好，世界", "", "word " * 400, "A gate closes it.", "x"]


def make_cross_encoder(folder: Path, n_labels: int = 1) -> Path:
    """Write a cross-encoder with random weights that are large enough to tell pairs apart."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder("minilm"))
    tokenizer.model_max_length = 128
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        initializer_range=0.4,
        num_labels=n_labels,
    )
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder."""
    return make_cross_encoder(tmp_path_factory.mktemp("cross"))


@pytest.fixture(scope="module")
def reranking(server: Server, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A worker that serves it."""
    toml = f'[models.cross]\ntask = "rerank"\nsource = "{folder}"\nmax_texts = 500\n'
    process = WorkerProcess(tmp_path_factory.mktemp("rerank"), server, toml=toml, queues="cpu.cross")
    try:
        process.wait_until_ready()
        yield
    finally:
        process.stop()


@pytest.fixture
def caller(server: Server, reranking: None) -> Iterator[Client]:
    """A client of that worker."""
    with Client(server.broker_url) as connected:
        yield connected


def test_scores_are_the_librarys(caller: Client, folder: Path) -> None:
    """`rerank` gives the scores of `CrossEncoder.predict` in the documents' order, and who is best."""
    ranking = caller.rerank(QUERY, DOCUMENTS, model="cross", top_n=3)

    expected = CrossEncoder(str(folder), device="cpu").predict([(QUERY, each) for each in DOCUMENTS])
    assert (ranking.scores.dtype, ranking.scores.shape) == (np.float32, (len(DOCUMENTS),))
    assert np.allclose(ranking.scores, expected, atol=1e-5)
    assert np.ptp(expected) > 0.1
    assert list(ranking.order) == np.argsort(-expected, kind="stable")[:3].tolist()
    assert ranking.usage.prompt_tokens > len(DOCUMENTS)
    assert ranking.timings.computed_s > 0


def test_jobs_share_batches_and_keep_their_scores(caller: Client, server: Server) -> None:
    """Many calls at once, from the twin that awaits, each get what they get alone."""
    queries = [f"query {i}" for i in range(20)]

    async def ask() -> list[np.ndarray]:
        async with AsyncClient(server.broker_url) as client:
            calls = [client.rerank(query, DOCUMENTS, model="cross") for query in queries]
            return [ranking.scores for ranking in await asyncio.gather(*calls)]

    together = asyncio.run(ask())

    alone = [caller.rerank(query, DOCUMENTS, model="cross").scores for query in queries]
    assert np.allclose(together, alone, atol=1e-5)


def test_no_documents_is_no_error(caller: Client) -> None:
    """Nothing to order is ordered at once."""
    ranking = caller.rerank(QUERY, (), model="cross")

    assert (ranking.scores.shape, list(ranking.order)) == ((0,), [])


def test_wrong_calls_are_told(caller: Client) -> None:
    """What can be known before anything is sent is a typed error; a late job is not computed."""
    with pytest.raises(WrongTaskError, match="'rerank', the request asks for 'embed'"):
        caller.embed(["a"], model="cross")
    with pytest.raises(InvalidTextError, match="text 1 is a int"):
        caller.rerank(QUERY, ["a", 7], model="cross")  # type: ignore[list-item]  # that is the point
    with pytest.raises(InvalidTextError, match="is empty"):
        caller.rerank("", ["a"], model="cross")
    with pytest.raises(InvalidOptionError, match="top_n is 0"):
        caller.rerank(QUERY, ["a"], model="cross", top_n=0)
    with pytest.raises(TooManyTextsError):
        caller.rerank(QUERY, ["a"] * 501, model="cross")
    with pytest.raises(DeadlineExceededError):
        caller.rerank(QUERY, ["a"], model="cross", deadline_s=1e-6)


def test_a_job_is_found_again(caller: Client) -> None:
    """A ranking can be fetched later, by its id."""
    job = caller.submit_rerank(QUERY, DOCUMENTS, model="cross", priority="batch")

    fetched = caller.job(job.id).result()

    assert repr(fetched) == "RerankResult(cross, 6 documents)"
    assert job.state() is JobState.SUCCEEDED


def test_lightrag_reranks(server: Server, worker: WorkerProcess, caller: Client) -> None:
    """`rerank_model_func` gives indices and relevance scores, the best first."""
    with LightRAGModels(server.broker_url, llm="chat", embedding="minilm", rerank="cross") as models:
        assert models.arguments()["rerank_model_func"] is models.rerank_model_func
        assert models.rerank_model_func is not None
        found = asyncio.run(models.rerank_model_func(query=QUERY, documents=DOCUMENTS, top_n=2))

    expected = caller.rerank(QUERY, DOCUMENTS, model="cross", top_n=2)
    assert [each["index"] for each in found] == list(expected.order)
    assert [each["relevance_score"] for each in found] == pytest.approx(
        [expected.scores[i] for i in expected.order], abs=1e-5
    )


def test_a_model_of_many_classes_does_not_start(server: Server, tmp_path: Path) -> None:
    """A classifier's numbers are no ranking: the worker says so and ends."""
    folder = make_cross_encoder(tmp_path / "classes", n_labels=3)
    toml = f'[models.classes]\ntask = "rerank"\nsource = "{folder}"\n'
    process = WorkerProcess(tmp_path, server, toml=toml, queues="cpu.classes")

    assert process.wait() != 0
    assert "it gives 3 numbers for a pair" in process.log
