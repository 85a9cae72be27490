"""Text to vectors: sentence-transformers' semantics, batches of our own."""

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from penstock.errors import EngineError, InvalidOptionError, ModelLoadError, OutOfMemoryError, PenstockError
from penstock.request import EmbedRequest
from penstock.result import Vectors
from penstock.settings import ModelSettings
from penstock_workers.engines.device import has_fast_bfloat16
from penstock_workers.engines.source import explain_failure, resolve_source

logger = logging.getLogger(__name__)

MIN_COSINE: Final = 0.9999
TOKENIZE_AT_ONCE: Final = 256

# What the reduced format is tried on before it is used: lengths and scripts, code, and nearly nothing.
PROBE: Final = (
    "a",
    "?",
    "A penstock is the pipe, with its gate, that feeds a turbine.",
    "def mean(xs):\n    return sum(xs) / len(xs)",
    "1 2 3 4 5 6 7 8 9 10",
    "naïve café, Ångström, Übergröße",
    "Привет, как дела? Это проверка.",
    "你好，世界。这是一个测试。",
    "日本語のテキストも埋め込めます。",
    "مرحبا بالعالم، هذا اختبار",
    "हिन्दी में एक छोटा वाक्य",
    "🙂 🙃 🚀",
    "the " * 40,
    "Services enqueue jobs and workers answer them with arrays. " * 12,
    "x = 3.14159; " * 120,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One tokenized text.

    Attributes:
        features: what the model takes, each integer, shape (n_tokens,).
        prompt_length: tokens of the prompt that pooling leaves out, else None.
    """

    features: dict[str, Tensor]
    prompt_length: int | None

    @property
    def n_tokens(self) -> int:
        """Real tokens, special ones counted."""
        return len(self.features["input_ids"])


class Embedder:
    """A sentence-transformers model on one device.

    Attributes:
        name: the name it is served under.
        dim: width of a vector.
        max_tokens: longer texts are cut, as `encode` does.
        dtype: format of the matrix products; everything else is float32.
    """

    def __init__(self, name: str, model: SentenceTransformer) -> None:
        self.name, self._model = name, model.eval()
        self.dim = int(model.get_embedding_dimension() or 0)
        self.max_tokens = model.max_seq_length
        self.dtype = "float32"
        self._tokenizing = threading.Lock()  # fast tokenizers refuse two threads that change their settings

    @classmethod
    def load(cls, name: str, model: ModelSettings, device: torch.device) -> Self:
        """Load a model, in the fastest format that keeps its vectors' directions.

        Raises:
            ModelLoadError: one line that says why.
        """
        engine = cls(name, _load(name, model, device))
        if model.dtype == "bfloat16" or (model.dtype == "auto" and has_fast_bfloat16(device)):
            plain = engine._probe()
            engine._use_bfloat16()
            worst = _worst_cosine(plain, engine._probe())
            if worst < MIN_COSINE:
                if model.dtype == "bfloat16":
                    raise ModelLoadError(name, f"bfloat16 turns its vectors: cosine {worst:.5f} to float32")
                logger.warning("bfloat16 turns vectors, float32 is used: cosine %.5f", worst)
                engine = cls(name, _load(name, model, device))
        elif model.dtype == "float16":
            engine._model.half()
            engine.dtype = "float16"
        return engine

    def prepare(self, request: EmbedRequest) -> list[Encoded]:
        """Tokenize a request's texts; safe to call in many threads.

        Raises:
            InvalidOptionError: the model has no prompt of that name, or fewer dimensions.
        """
        if request.truncate_dim is not None and request.truncate_dim > self.dim:
            raise InvalidOptionError("truncate_dim", str(request.truncate_dim), f"at most {self.dim}")
        prompt = self._prompt(request)
        encoded: list[Encoded] = []
        for start in range(0, len(request.texts), TOKENIZE_AT_ONCE):
            with self._tokenizing:
                padded = self._model.preprocess(
                    request.texts[start : start + TOKENIZE_AT_ONCE], prompt=prompt
                )
            encoded += _unpad(padded)
        return encoded

    def run(
        self, batch: Sequence[Encoded]
    ) -> Iterator[tuple[int, NDArray[np.float32] | PenstockError] | None]:
        """Embed a batch; yields (index, vector of float32, shape (dim,)) or the item's error.

        Raises:
            OutOfMemoryError: the batch did not fit; the engine stays usable.
        """
        groups: dict[int | None, list[int]] = {}
        for index, text in enumerate(batch):
            groups.setdefault(text.prompt_length, []).append(index)
        for prompt_length, indices in groups.items():
            vectors = self._forward([batch[i] for i in indices], prompt_length)
            # sums are not finite if one element is not, and a zero vector has no direction to compare
            norms = np.linalg.norm(vectors, axis=1)
            for index, vector, norm in zip(indices, vectors, norms, strict=True):
                usable = np.isfinite(norm) and norm > 0
                yield index, vector if usable else EngineError(self.name, "a vector is zero or not finite")

    def finish(self, request: EmbedRequest, vectors: Sequence[NDArray[np.float32]]) -> Vectors:
        """Return a request's vectors in the form it asked for, shape (n_texts, dim)."""
        if not vectors:
            return np.zeros((0, request.truncate_dim or self.dim), dtype=request.precision)
        found = np.stack(vectors)[:, : request.truncate_dim]
        if request.normalize_embeddings:
            # Source: torch.nn.functional.normalize, which `encode` uses: norms are clamped to 1e-12.
            found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return np.ascontiguousarray(found, dtype=request.precision)

    def _prompt(self, request: EmbedRequest) -> str | None:
        prompts: dict[str | None, str] = self._model.prompts
        if request.prompt is not None:
            return request.prompt
        if request.prompt_name is not None and request.prompt_name not in prompts:
            known = ", ".join(sorted(filter(None, prompts))) or "none"
            raise InvalidOptionError("prompt_name", repr(request.prompt_name)[:80], f"prompts here: {known}")
        return prompts.get(request.prompt_name or self._model.default_prompt_name)

    @torch.inference_mode()
    def _forward(self, texts: Sequence[Encoded], prompt_length: int | None) -> NDArray[np.float32]:
        features: dict[str, Any] = self._pad(texts)
        if prompt_length is not None:
            features["prompt_length"] = prompt_length
        try:
            with self._format():
                vectors = self._model(features)["sentence_embedding"]
            found: NDArray[np.float32] = vectors.float().cpu().numpy()  # (n_texts, dim)
            return found
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(self.name, max(text.n_tokens for text in texts)) from error

    def _pad(self, texts: Sequence[Encoded]) -> dict[str, Tensor]:
        padding = {"input_ids": self._model.tokenizer.pad_token_id or 0}
        return {
            key: nn.utils.rnn.pad_sequence(
                [text.features[key] for text in texts], batch_first=True, padding_value=padding.get(key, 0)
            ).to(self._model.device)
            for key in texts[0].features
        }

    def _format(self) -> contextlib.AbstractContextManager[None]:
        if self.dtype != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self._model.device.type, torch.bfloat16)

    def _use_bfloat16(self) -> None:
        # Products in bfloat16, sums, norms and softmax in float32: the smallest cosine to float32 stays
        # above 0.9999 where a model that is bfloat16 throughout falls below it.
        for module in self._model.modules():
            if type(module) is nn.Linear:
                module.to(torch.bfloat16)
        self.dtype = "bfloat16"

    def _probe(self) -> NDArray[np.float32]:
        encoded = self.prepare(EmbedRequest(model=self.name, texts=list(PROBE)))
        return np.concatenate([self._forward([text], text.prompt_length) for text in encoded])


def _load(name: str, model: ModelSettings, device: torch.device) -> SentenceTransformer:
    source = resolve_source(name, model)
    try:
        return SentenceTransformer(
            source,
            device=str(device),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            model_kwargs={"dtype": torch.float32},
        )
    except Exception as error:  # whatever the library meets in foreign files, the start fails in one line
        raise explain_failure(name, error) from error


def _unpad(padded: dict[str, Any]) -> list[Encoded]:
    mask = padded["attention_mask"].bool()
    keys = [key for key, value in padded.items() if torch.is_tensor(value) and value.shape == mask.shape]
    prompt_length = padded.get("prompt_length")
    return [
        Encoded(
            features={key: padded[key][row][mask[row]] for key in keys},
            prompt_length=None if prompt_length is None else int(prompt_length),
        )
        for row in range(len(mask))
    ]


def _worst_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.nan_to_num((a * b).sum(axis=1) / norms, nan=-1).min())
