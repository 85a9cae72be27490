"""Texts to vectors: sentence-transformers' semantics, batches of our own."""

import bisect
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from penstock.errors import EngineError, InvalidOptionError, ModelLoadError, OutOfMemoryError, PenstockError
from penstock.request import EmbedRequest
from penstock.validation import describe
from penstock_workers.checkpoint.checks import check_files
from penstock_workers.checkpoint.failures import explained
from penstock_workers.checkpoint.memory import check_memory, weights_bytes
from penstock_workers.checkpoint.source import resolve_source
from penstock_workers.checkpoint.weights import Weights, reading
from penstock_workers.embedding.choosing import Ways
from penstock_workers.embedding.collating import check_vocabulary, choose_collator, set_padding
from penstock_workers.embedding.fingerprint import hash_model
from penstock_workers.embedding.int8_ranges import Int8Ranges
from penstock_workers.embedding.padded import Padded
from penstock_workers.embedding.positions import fit_positions
from penstock_workers.embedding.probe import Probe, probe_texts
from penstock_workers.embedding.tokenizing import FOREIGN, Encoded, TextTokenizer
from penstock_workers.embedding.way import Way, WayName, compute
from penstock_workers.settings import ModelSettings

logger = logging.getLogger(__name__)

BATCH_TOKENS: Final = tuple(1024 << i for i in range(8))
"""Batch sizes that are tried on a GPU; TEI's default, 16,384, is among them."""
TYPICAL_TOKENS: Final = 128
"""Tokens of each text in these batches."""
NEARLY: Final = 0.95
"""Share of the best speed that is enough."""
LEAST_TOKENS: Final = 8
"""A model that fails at shorter texts fails for another reason than their length."""
UNBOUNDED_TOKENS: Final = 1 << 31
"""A higher limit is none: tokenizers without a limit say 10**30."""
GPU_TOKENIZERS: Final = 4
"""Jobs that are tokenized at once beside a GPU."""


class Embedder:
    """A sentence-transformers model on one device.

    Attributes:
        name: Name that the model is served under.
        dim: Width of a vector.
        max_tokens: Tokens of a text that are read, as `encode` does; None: all.
        n_heads: Heads of its attention, where their number is known.
        fingerprint: Hash of all that decides vectors; empty where none are cached.
    """

    def __init__(self, name: str, model: SentenceTransformer) -> None:
        self.name, self._model = name, model.eval()
        config = getattr(getattr(model[0], "auto_model", None), "config", None)
        self.n_heads: int | None = getattr(config, "num_attention_heads", None)
        self.dim = int(model.get_embedding_dimension() or 0)
        self.max_tokens = _max_tokens(model)
        self._int8: Int8Ranges | None = None
        self.fingerprint = ""
        self._n_rows = check_vocabulary(name, model)  # where its tokenizer knows more than that
        self._collator = choose_collator(model)
        self._way: Way = Padded(model, self._collator)
        self._texts = probe_texts(model.tokenizer)
        # The model thread of a GPU leaves the CPU to them.
        n_at_once = 1 if model.device.type == "cpu" else GPU_TOKENIZERS
        self._tokenizer = TextTokenizer(model, self._texts, n_at_once, self._collator.preprocess)

    @classmethod
    def load(cls, name: str, model: ModelSettings, device: torch.device) -> Self:
        """Load a model; the fastest way that keeps its vectors' directions computes them.

        Raises:
            ModelLoadError: One line says why.
        """
        with explained(name):
            loaded, weights = _load(name, model, device)
            engine = cls(name, loaded)
            fingerprint = hash_model(loaded, model)
            if model.cache is not None:
                engine.fingerprint = fingerprint
            if model.dtype == "float16":
                loaded.half()
                engine._way = Padded(loaded, engine._collator, dtype="float16")
            probe = engine._embed_probe()
            if not np.isfinite(probe.plain).all():
                weights.check_all(name)
                raise ModelLoadError(name, "it gives vectors that are not finite")
            engine._int8 = engine._decide_ranges(model, probe.plain)
            engine._way = engine._ways(model, probe).choose(fingerprint)
            return engine

    @property
    def dtype(self) -> str:
        """Return the format of matrix products; see `Way.dtype`."""
        return self._way.dtype

    @property
    def batching(self) -> WayName:
        """Return how texts share a batch; see `Way.name`."""
        return self._way.name

    @property
    def is_padded(self) -> bool:
        """Tell whether a batch costs its longest text times their number."""
        return self._way.is_padded

    @property
    def int8_ranges(self) -> NDArray[np.float32] | None:
        """Return what `serving.formats.form` takes, shape (2, dim) or (2, 1); None before `load`."""
        return None if self._int8 is None else self._int8.values

    def prepare(self, request: EmbedRequest) -> list[Encoded]:
        """Tokenize a request's texts; safe to call in many threads.

        Raises:
            InvalidOptionError: The model has no prompt of that name, or cannot give vectors of that form.
        """
        return self._tokenizer.encode(request.texts, self.check(request))

    def check(self, request: EmbedRequest) -> str | None:
        """Return the prompt that goes before each text.

        Raises:
            InvalidOptionError: See `prepare`.
        """
        if request.truncate_dim is not None and request.truncate_dim > self.dim:
            raise InvalidOptionError("truncate_dim", str(request.truncate_dim), f"at most {self.dim}")
        fit_any_length = self._int8 is not None and self._int8.fit_any_length
        if request.precision == "int8" and not (fit_any_length or request.normalize_embeddings):
            allowed = "this model's vectors are of any length: with normalize_embeddings, or its int8_ranges"
            raise InvalidOptionError("precision", "'int8'", allowed)
        return self._prompt(request)

    def run(
        self, batch: Sequence[Encoded]
    ) -> Iterator[tuple[int, NDArray[np.float32] | PenstockError] | None]:
        """Embed a batch; yield the index of each text, with its vector, float32, shape (dim,), or its error.

        Raises:
            OutOfMemoryError: The batch did not fit; the engine stays usable.
        """
        groups: dict[int | None, list[int]] = {}
        for index, text in enumerate(batch):
            if self._n_rows is not None and text.n_tokens and text.part("input_ids").max() >= self._n_rows:
                # would end the whole batch, and on a GPU all that follow
                yield index, EngineError(self.name, "a text holds a token that the model lacks")
            elif text.n_tokens:
                groups.setdefault(text.prompt_length, []).append(index)
            else:
                yield index, EngineError(self.name, "its tokenizer finds no token in a text")
        for indices in groups.values():
            vectors = self._compute([batch[i] for i in indices])
            # sums are not finite if one element is not, and a zero vector has no direction to compare
            norms = np.linalg.norm(vectors, axis=1)
            for index, vector, norm in zip(indices, vectors, norms, strict=True):
                if not (np.isfinite(norm) and norm > 0):
                    yield index, EngineError(self.name, "a vector is zero or not finite")
                elif len(vector) != self.dim:
                    yield index, EngineError(self.name, f"a vector has {len(vector)} numbers, not {self.dim}")
                else:
                    yield index, vector

    def learn_batch_tokens(self) -> tuple[int, float | None]:
        """Return the tokens of the smallest batch at which the device is nearly as fast as it gets.

        Larger batches gain nothing, and jobs that come next wait for them. Takes a second or two on a GPU.

        Returns:
            The tokens, and the seconds that such a batch takes; None if not even the smallest fits.
        """
        text = max(self._probe_texts(), key=lambda text: text.n_tokens)
        text = text.of_length(min(TYPICAL_TOKENS, text.n_tokens))
        speeds: dict[int, float] = {}
        for n_tokens in BATCH_TOKENS:
            batch = [text] * max(1, n_tokens // text.n_tokens)
            try:
                self._compute(batch)  # the first of a shape has more to do
                began = time.perf_counter()
                for _ in range(3):
                    self._compute(batch)
            except OutOfMemoryError:
                break  # the batcher learns the exact limit from a lack of memory
            speeds[n_tokens] = 3 * n_tokens / (time.perf_counter() - began)
        enough = NEARLY * max(speeds.values(), default=0.0)
        for n_tokens, speed in speeds.items():
            if speed >= enough:
                return n_tokens, n_tokens / speed
        return BATCH_TOKENS[0], None

    def _prompt(self, request: EmbedRequest) -> str | None:
        prompts: dict[str | None, str] = self._model.prompts
        if request.prompt is not None:
            return request.prompt
        if request.prompt_name is not None and request.prompt_name not in prompts:
            known = ", ".join(sorted(filter(None, prompts))) or "none"
            raise InvalidOptionError("prompt_name", describe(request.prompt_name), f"prompts here: {known}")
        return prompts.get(request.prompt_name or self._model.default_prompt_name)

    def _compute(self, texts: Sequence[Encoded]) -> NDArray[np.float32]:
        """Embed texts that share a prompt; see `way.compute`."""
        return compute(self._way, texts, self.name)

    def _decide_ranges(self, model: ModelSettings, plain: NDArray[np.float32]) -> Int8Ranges:
        """Decide what int8 vectors mean, for as long as the model is the same."""
        try:
            return Int8Ranges.decide(plain, model.int8_ranges, self.dim)
        except (OSError, ValueError) as error:
            raise ModelLoadError(self.name, f"int8_ranges: {error}") from error

    def _ways(self, model: ModelSettings, probe: Probe) -> Ways:
        return Ways(
            name=self.name,
            model=self._model,
            settings=model,
            collator=self._collator,
            probe=probe,
            example=self.prepare(EmbedRequest(model=self.name, texts=["a text", "another one"])),
        )

    def _embed_probe(self) -> Probe:
        """Embed the probe by the model's own modules; finds out how long a text may be, if longer ones fail.

        Raises:
            ModelLoadError: The tokenizer finds no token.
            Exception: The model's own code fails at short texts too.
        """
        texts = self._probe_texts()
        if not texts:
            raise ModelLoadError(self.name, "its tokenizer finds no token in any text of the probe")
        try:
            return Probe(self.name, texts, self._way)
        except FOREIGN:
            # a GPU does not go on after an index that is out of its table
            limit = self._find_limit(texts) if self._way.device.type == "cpu" else 0
            if not limit:
                raise
            logger.warning("model %s: texts are cut at %d tokens, longer ones fail", self.name, limit)
        self._model.max_seq_length = self.max_tokens = limit
        self._tokenizer = TextTokenizer(self._model, self._texts, 1, self._collator.preprocess)
        return Probe(self.name, self._probe_texts(), self._way)

    def _find_limit(self, texts: Sequence[Encoded]) -> int:
        """Return the length of the longest text that can be embedded; 0 if not even short ones can."""
        longest = max(texts, key=lambda text: text.n_tokens)

        def fails(n_tokens: int) -> bool:
            try:
                self._compute([longest.of_length(n_tokens)])
            except FOREIGN:
                return True
            return False

        n_tokens = bisect.bisect_left(range(1, longest.n_tokens + 1), True, key=fails)
        return n_tokens if n_tokens >= LEAST_TOKENS else 0

    def _probe_texts(self) -> list[Encoded]:
        """Return the texts of the probe; texts without a token are left out."""
        found = self.prepare(EmbedRequest(model=self.name, texts=list(self._texts)))
        return [text for text in found if text.n_tokens]


def _load(name: str, model: ModelSettings, device: torch.device) -> tuple[SentenceTransformer, Weights]:
    source = resolve_source(name, model)
    options = check_files(name, source, model)
    weights = weights_bytes(source, model.revision, torch.float32)
    for place in dict.fromkeys((torch.device("cpu"), device)):  # they are read there first
        check_memory(name, weights, [place])
    with reading(name) as found:
        loaded = SentenceTransformer(
            source,
            device=str(device),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            model_kwargs={"dtype": torch.float32, **options},
        )
        set_padding(loaded.tokenizer)
        fit_positions(name, loaded)
    found.blank()
    return loaded, found


def _max_tokens(model: SentenceTransformer) -> int | None:
    """Return how many tokens of a text are read; None for all of them."""
    found = model.max_seq_length
    return None if found is None or not 0 < found < UNBOUNDED_TOKENS else int(found)
