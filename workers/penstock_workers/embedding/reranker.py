"""Pairs of query and document to scores: sentence-transformers' cross-encoders, batches of our own."""

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder

from penstock.errors import EngineError, ModelLoadError, OutOfMemoryError, PenstockError
from penstock.request import RerankRequest
from penstock_workers.checkpoint.checks import check_files
from penstock_workers.checkpoint.failures import explained
from penstock_workers.checkpoint.source import resolve_source
from penstock_workers.checkpoint.weights import Weights, reading
from penstock_workers.embedding.bfloat16 import use_bfloat16
from penstock_workers.embedding.collating import PaddedCollator, check_vocabulary, set_padding
from penstock_workers.embedding.positions import fit_positions
from penstock_workers.embedding.tokenizing import AT_ONCE, Encoded
from penstock_workers.settings import ModelSettings

logger = logging.getLogger(__name__)

PROBE: Final = RerankRequest(
    model="probe",
    query="What is a penstock?",
    documents=["A pipe.", "A long one. " * 9, "One that feeds a turbine."],
)
TOLERANCE: Final = 1e-3
"""Largest difference between a pair's scores alone and in a batch, relative to the largest score.

float32 stays far below.
"""


class Reranker:
    """A cross-encoder on one device, with the scores of its own `predict`.

    Batches are padded, and `dtype = "auto"` is float32: a score has no direction by which a faster way could
    be compared.

    Attributes:
        name: Name that the model is served under.
        max_tokens: Tokens of a pair that are read, as `predict` does.
        dtype: Format of matrix products; unless it is float16, everything else is float32.
        n_heads: Heads of its attention, where their number is known.
        batching: Always `padded`: pairs share a forward pass, padded to the longest.
        is_padded: Always True: a batch costs its longest pair times their number.
    """

    batching: Literal["padded"] = "padded"
    is_padded = True

    def __init__(self, name: str, model: CrossEncoder) -> None:
        self.name, self._model = name, model.eval()
        self.n_heads: int | None = getattr(getattr(model.model, "config", None), "num_attention_heads", None)
        self.max_tokens = model.max_seq_length
        # A decoder is read at its last token, so its padding is on the left.
        self._collator = PaddedCollator(model, model.tokenizer.padding_side)
        self._is_one_by_one = False
        self._n_rows = check_vocabulary(name, model)  # where its tokenizer knows more than that
        self.dtype = "float32"
        self._tokenizing = threading.Lock()  # fast tokenizers refuse two threads that change their settings

    @classmethod
    def load(cls, name: str, model: ModelSettings, device: torch.device) -> Self:
        """Load a model.

        Raises:
            ModelLoadError: One line says why.
        """
        with explained(name):
            loaded, weights = _load(name, model, device)
            engine = cls(name, loaded)
            if (n_labels := engine._model.num_labels) != 1:
                raise ModelLoadError(name, f"it gives {n_labels} numbers for a pair; to rerank takes one")
            engine._choose_padding(weights)
            if model.dtype == "float16":
                engine._model.half()
            elif model.dtype == "bfloat16":
                use_bfloat16(engine._model)
            engine.dtype = "float32" if model.dtype == "auto" else model.dtype
            if not np.isfinite(engine._forward(engine.prepare(PROBE))).all():
                raise ModelLoadError(name, f"it gives no finite score for a pair in {engine.dtype}")
            return engine

    def prepare(self, request: RerankRequest) -> list[Encoded]:
        """Tokenize a request's pairs; safe to call in many threads."""
        pairs = [[request.query, document] for document in request.documents]
        prompt = self._model.prompts.get(self._model.default_prompt_name or "")
        encoded: list[Encoded] = []
        for start in range(0, len(pairs), AT_ONCE):
            with self._tokenizing:
                encoded += self._collator.preprocess(pairs[start : start + AT_ONCE], prompt)
        return encoded

    def run(self, batch: Sequence[Encoded]) -> Iterator[tuple[int, float | PenstockError] | None]:
        """Score a batch; yield the index of each pair, with its score or its error.

        Raises:
            OutOfMemoryError: The batch did not fit; the engine stays usable.
        """
        known = list(range(len(batch)))
        if self._n_rows is not None:
            known = [i for i in known if batch[i].part("input_ids").max(initial=0) < self._n_rows]
            for index in set(range(len(batch))) - set(known):
                yield index, EngineError(self.name, "a pair holds a token that the model lacks")
            if not known:
                return
        for index, score in zip(known, self._forward([batch[i] for i in known]).tolist(), strict=True):
            if np.isfinite(score):
                yield index, score
            else:
                yield index, EngineError(self.name, "a score is not finite")

    def _choose_padding(self, weights: Weights) -> None:
        """Choose the side on which pairs are padded; compute each pair alone if both sides change scores.

        A tokenizer may name the wrong side. With positions that count from the left, no side is right.

        Raises:
            ModelLoadError: The model scores no pair, or all alike.
        """
        pairs = self.prepare(PROBE)
        alone = np.concatenate([self._raw([pair]).cpu().numpy().reshape(-1) for pair in pairs])
        if len(alone) != len(pairs) or not np.isfinite(alone).all():
            weights.check_all(self.name)
            raise ModelLoadError(self.name, "it gives no finite score for a pair")
        if np.ptp(alone) == 0:
            raise ModelLoadError(self.name, "it gives all pairs the same score")
        own = self._model.tokenizer.padding_side
        limit = TOLERANCE * max(1.0, float(np.abs(alone).max()))
        for side in (own, "left" if own == "right" else "right"):
            self._collator = PaddedCollator(self._model, side)
            together = self._raw(self.prepare(PROBE)).cpu().numpy().reshape(-1)
            if np.allclose(together, alone, rtol=0, atol=limit):
                return
        self._is_one_by_one = True
        logger.warning("model %s: pairs are scored one by one, padding changes their scores", self.name)

    def _raw(self, pairs: Sequence[Encoded]) -> torch.Tensor:
        """Return the scores before their activation, float32, shape (n_pairs, 1) or (n_pairs,)."""
        groups = [[pair] for pair in pairs] if self._is_one_by_one else [pairs]
        with torch.inference_mode():
            batches = [self._collator.collate(group, self._model.device) for group in groups]
            return torch.cat([self._model(batch)["scores"].float() for batch in batches])

    @torch.inference_mode()
    def _forward(self, pairs: Sequence[Encoded]) -> NDArray[np.float32]:
        """Return the scores, float32, shape (n_pairs,)."""
        try:
            scores = self._model.activation_fn(self._raw(pairs))
            found: NDArray[np.float32] = scores.cpu().numpy().reshape(len(pairs))
            return found
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(self.name, max(pair.n_tokens for pair in pairs)) from error


def _load(name: str, model: ModelSettings, device: torch.device) -> tuple[CrossEncoder, Weights]:
    source = resolve_source(name, model)
    options: dict[str, Any] = {"model_kwargs": {"dtype": torch.float32, **check_files(name, source, model)}}
    with reading(name) as weights:
        loaded = CrossEncoder(
            source,
            device=str(device),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
        set_padding(loaded.tokenizer)
        fit_positions(name, loaded)
    weights.blank()
    return loaded, weights
