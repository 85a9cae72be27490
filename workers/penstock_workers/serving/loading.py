"""Settings to a served model; besides `penstock tune` nothing else imports engines."""

from dataclasses import replace
from typing import TYPE_CHECKING

from penstock.errors import ModelLoadError
from penstock.extras import how_to_install
from penstock.registry import ModelInfo
from penstock_workers.batching.batcher import Batcher
from penstock_workers.batching.cuts import Cut, cut_by_tokens
from penstock_workers.batching.feed import A, Feed, I, StreamingFeed
from penstock_workers.batching.scheduler import Scheduler
from penstock_workers.batching.turns import Turn
from penstock_workers.checkpoint.failures import explained
from penstock_workers.remote.dispatcher import Dispatcher
from penstock_workers.serving.models import (
    AnyServed,
    EmbedEngine,
    GenerateEngine,
    RerankEngine,
    Served,
    Vector,
)
from penstock_workers.serving.vector_cache import VectorCache
from penstock_workers.settings import ModelSettings, Settings

if TYPE_CHECKING:  # torch loads with the first model, not with the app
    import torch

    from penstock_workers.embedding.embedder import Embedder
    from penstock_workers.embedding.reranker import Reranker
    from penstock_workers.remote.embedding import RemoteEmbedder


def load_model(
    name: str, settings: Settings, device: "torch.device | None", turn: Turn | None = None
) -> AnyServed:
    """Load a model and start what feeds it.

    Args:
        name: Name of the model.
        settings: Settings of the deployment.
        device: Device it computes on; remote models need none.
        turn: See `ModelThread`.

    Raises:
        ModelLoadError: one line that says why.
    """
    model = settings.models[name]
    with explained(name):
        if model.engine == "remote":
            return _load_remote(name, model, settings)
        assert device is not None
        match model.task:
            case "embed":
                return _load_embedder(name, settings, device, turn)
            case "rerank":
                return _load_reranker(name, model, device, turn)
            case "generate":
                return _load_generator(name, model, device, turn)


def _load_embedder(name: str, settings: Settings, device: "torch.device", turn: Turn | None) -> AnyServed:
    from penstock_workers.embedding.embedder import Embedder

    model = settings.models[name]
    embedder = Embedder.load(name, model, device)
    measured = None
    if device.type != "cpu" and model.max_batch_tokens is None:
        n_tokens, seconds = embedder.learn_batch_tokens()
        measured = None if seconds is None else (n_tokens, seconds)
        model = model.model_copy(update={"max_batch_tokens": n_tokens})
    return _serve_embedder(
        replace(
            _describe(name, model, embedder.dim, embedder.max_tokens, embedder.dtype, embedder.batching),
            int8_ranges=_announce_ranges(embedder.int8_ranges),
        ),
        embedder,
        Batcher(
            name,
            embedder.run,
            cut_texts(model, embedder, device),
            turn,
            n_threads=batches_at_once(device, turn),
            measured=measured,
        ),
        _open_cache(embedder, settings),
    )


def _load_reranker(name: str, model: ModelSettings, device: "torch.device", turn: Turn | None) -> AnyServed:
    from penstock_workers.embedding.reranker import Reranker

    reranker = Reranker.load(name, model, device)
    return _serve_reranker(
        _describe(name, model, None, reranker.max_tokens, reranker.dtype, reranker.batching),
        reranker,
        Batcher(name, reranker.run, cut_texts(model, reranker, device), turn),
    )


def _load_generator(name: str, model: ModelSettings, device: "torch.device", turn: Turn | None) -> AnyServed:
    from penstock_workers.generation.generator import Generator

    generator = Generator.load(name, model, device)
    if turn is not None:
        generator.pause_between_layers(turn.pause)
    return _serve_generator(
        _describe(name, model, None, generator.context_window, generator.dtype, str(generator.batch_mode)),
        generator,
        Scheduler(name, generator.decoding(max_rows=model.max_batch_size), generator.sequence, turn),
    )


def _load_remote(name: str, model: ModelSettings, settings: Settings) -> AnyServed:
    try:
        from penstock_workers.remote.chat import RemoteGenerator
        from penstock_workers.remote.embedding import RemoteEmbedder
    except ModuleNotFoundError as error:
        raise ModelLoadError(name, f"{error.name} is missing: {how_to_install('remote')}") from error
    if model.task == "embed":
        embedder = RemoteEmbedder.load(name, model, settings.broker_url)
        return _serve_embedder(
            replace(
                _describe(name, model, embedder.dim, embedder.max_tokens, "remote", embedder.protocol),
                int8_ranges=_announce_ranges(embedder.int8_ranges),
            ),
            embedder,
            Dispatcher(embedder),
            _open_cache(embedder, settings),
        )
    generator = RemoteGenerator.load(name, model, settings.broker_url)
    info = _describe(name, model, None, generator.context_window, "remote", "openai")
    return _serve_generator(info, generator, Dispatcher(generator))


# An engine and its feed have to agree on what they pass to each other: told by these signatures.


def _serve_embedder(
    info: ModelInfo, engine: EmbedEngine[I], feed: Feed[I, Vector], cache: VectorCache | None
) -> AnyServed:
    return Served(info=info, engine=engine, feed=feed, cache=cache)


def _serve_reranker(info: ModelInfo, engine: RerankEngine[I], feed: Feed[I, float]) -> AnyServed:
    return Served(info=info, engine=engine, feed=feed)


def _serve_generator(info: ModelInfo, engine: GenerateEngine[I, A], feed: StreamingFeed[I, A]) -> AnyServed:
    return Served(info=info, engine=engine, feed=feed)


def cut_texts(model: ModelSettings, engine: "Embedder | Reranker", device: "torch.device") -> Cut:
    """Return how the batches of a model that reads texts are cut."""
    return cut_by_tokens(
        model.max_batch_tokens or _batch_tokens(device, engine.batching),
        is_padded=engine.is_padded,
        # accelerators have attention kernels that keep no scores
        n_heads=engine.n_heads if device.type == "cpu" else None,
    )


def batches_at_once(device: "torch.device", turn: Turn | None = None) -> int:
    """Return how many batches of an embedding model are in progress: two on a GPU of its own.

    There a thread waits for kernels most of the time, and kernels for a thread that lays out the next batch.
    """
    return 2 if device.type == "cuda" and turn is None else 1


def _batch_tokens(device: "torch.device", batching: str) -> int:
    # Measured on a CPU with all-MiniLM-L6-v2, one thread: padded, 180 texts/s by 512 tokens, 171 by
    # 1,024, 150 by 2,048, since activations then stay in its caches; packed, 237, 243 and 256; by OpenVINO,
    # 269, 272 and 263. Two processes at once: packed, 511, 528 and 494. Accelerators want far more: the
    # default of TEI.
    if device.type != "cpu":
        return 16_384
    return 512 if batching == "padded" else 1024


def _open_cache(embedder: "Embedder | RemoteEmbedder", settings: Settings) -> VectorCache | None:
    cache = settings.models[embedder.name].cache
    if cache is None:
        return None
    return VectorCache(
        embedder.name,
        embedder.fingerprint,
        embedder.dim,
        cache,
        url=settings.results_url,
        lease_s=settings.worker.lease_s,
    )


def _announce_ranges(ranges: Vector | None) -> tuple[tuple[float, ...], ...] | None:
    # nine digits are all of a float32
    return None if ranges is None else tuple(tuple(float(f"{x:.9g}") for x in row) for row in ranges)


def _describe(
    name: str, model: ModelSettings, dim: int | None, max_tokens: int | None, dtype: str, batching: str
) -> ModelInfo:
    return ModelInfo(
        name=name,
        task=model.task,
        pools=model.pools,
        dim=dim,
        max_tokens=max_tokens,
        max_texts=model.max_texts,
        deadline_s=model.deadline_s,
        max_waiting_jobs=model.max_waiting_jobs,
        max_waiting_tokens=model.max_waiting_tokens,
        max_waiting_bytes=model.max_waiting_bytes,
        dtype=dtype,
        batching=batching,
    )
