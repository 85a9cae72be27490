"""Text to vectors: sentence-transformers' semantics, batches of our own."""

import bisect
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor, nn

from penstock.errors import EngineError, InvalidOptionError, ModelLoadError, OutOfMemoryError, PenstockError
from penstock.request import EmbedRequest
from penstock.settings import ModelSettings
from penstock.validation import describe
from penstock_workers.checkpoint.checks import check_files
from penstock_workers.checkpoint.memory import check_memory, weights_bytes
from penstock_workers.checkpoint.source import explain_failure, resolve_source
from penstock_workers.checkpoint.weights import Weights, reading
from penstock_workers.embedding.bert_c import BertC
from penstock_workers.embedding.bert_gpu import BertGpu
from penstock_workers.embedding.bfloat16 import use_bfloat16
from penstock_workers.embedding.c_kernels import find_kernels
from penstock_workers.embedding.collating import check_vocabulary, choose_collator, set_padding
from penstock_workers.embedding.int8_ranges import are_unit, choose_ranges, read_ranges
from penstock_workers.embedding.measured import machine_key, recall, remember
from penstock_workers.embedding.openvino import Compiled, is_installed
from penstock_workers.embedding.packed import Packed
from penstock_workers.embedding.positions import fit_positions
from penstock_workers.embedding.tokenizing import FOREIGN, Encoded, TextTokenizer
from penstock_workers.hardware.copies import download
from penstock_workers.hardware.device import has_fast_bfloat16, name_device, own_stream

logger = logging.getLogger(__name__)

MIN_COSINE: Final = 0.9999
BATCH_TOKENS: Final = tuple(1024 << i for i in range(8))
"""Sizes that are tried on a card; TEI's default is among them, 16,384."""
TYPICAL_TOKENS: Final = 128
NEARLY: Final = 0.95

# What every faster way is tried on before it is used: lengths and scripts, code, and nearly nothing.
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

LEAST_TOKENS: Final = 8
"""A model that fails at shorter texts fails for another reason than their length."""
N_PADDED: Final = 4
"""Texts of the probe in a batch that is padded."""
N_OWN_WORDS: Final = 32
"""Words of a tokenizer that has no special tokens, which may know none of the probe's."""
UNBOUNDED_TOKENS: Final = 1 << 31
"""A limit above is none: tokenizers without one say 10**30."""
CARD_TOKENIZERS: Final = 4
"""Jobs that are tokenized at once beside a card."""
CARD_PROBES: Final = 16
"""How often the probe is in a batch that formats are timed on, on a card."""
RACE: Final = ((12, 40), (32, 16), (96, 6), (256, 2))
"""Batches that engines are timed on: tokens of the longest text, and texts, up to an eighth shorter."""


class Embedder:
    """A sentence-transformers model on one device.

    Attributes:
        name: the name it is served under.
        dim: width of a vector.
        max_tokens: longer texts are cut, as `encode` does.
        dtype: format of the matrix products; unless it is float16, everything else is float32.
        n_heads: of its attention, where that is known.
        int8_ranges: see `serving.formats.form`; None before `load`.
        fingerprint: differs if anything does that decides vectors; empty where none are cached.
    """

    def __init__(self, name: str, model: SentenceTransformer) -> None:
        self.name, self._model = name, model.eval()
        config = getattr(getattr(model[0], "auto_model", None), "config", None)
        self.n_heads: int | None = getattr(config, "num_attention_heads", None)
        self._packed: Packed | None = None
        self._is_one_by_one = False
        self._compiled: Compiled | None = None
        self._undo_bfloat16: Callable[[], None] = lambda: None
        self.dim = int(model.get_embedding_dimension() or 0)
        self.max_tokens = _max_tokens(model)
        self.dtype = "float32"
        self.int8_ranges: NDArray[np.float32] | None = None
        self._has_int8 = False
        self.fingerprint = ""
        self._n_rows = check_vocabulary(name, model)  # where its tokenizer knows more than that
        # A card's model thread leaves the processors to them.
        n_at_once = 1 if model.device.type == "cpu" else CARD_TOKENIZERS
        self._collator = choose_collator(model)
        self._texts = (*PROBE, *_own_words(model.tokenizer))
        self._tokenizer = TextTokenizer(model, self._texts, n_at_once, self._collator.preprocess)

    @classmethod
    def load(cls, name: str, model: ModelSettings, device: torch.device) -> Self:
        """Load a model, in the fastest format that keeps its vectors' directions.

        Raises:
            ModelLoadError: one line that says why.
        """
        try:
            return cls._load(name, model, device)
        except ModelLoadError:
            raise
        except Exception as error:  # of foreign code on foreign files
            raise explain_failure(name, error) from error

    @classmethod
    def _load(cls, name: str, model: ModelSettings, device: torch.device) -> Self:
        loaded, weights = _load(name, model, device)
        engine = cls(name, loaded)
        if model.cache is not None:
            engine.fingerprint = _fingerprint(engine._model, model)
        if model.dtype == "float16":
            engine._model.half()
            engine.dtype = "float16"
        plain = engine._probe_first(device)
        if not np.isfinite(plain).all():
            weights.check_all(name)
            raise ModelLoadError(name, "it gives vectors that are not finite")
        engine._choose_ranges(model, plain)
        engine._choose_ways(model, plain, device)
        return engine

    @property
    def batching(self) -> Literal["packed", "padded", "padded, OpenVINO"]:
        """Whether texts of a batch lie end to end or are padded to the longest; whose, if not torch's."""
        if self._compiled is not None:
            return "padded, OpenVINO"
        return "padded" if self._packed is None else "packed"

    @property
    def is_padded(self) -> bool:
        """Whether a batch costs its longest text times their number."""
        return self._packed is None

    def prepare(self, request: EmbedRequest) -> list[Encoded]:
        """Tokenize a request's texts; safe to call in many threads.

        Raises:
            InvalidOptionError: the model has no prompt of that name, or cannot give vectors of that form.
        """
        return self._tokenizer.encode(request.texts, self.check(request))

    def check(self, request: EmbedRequest) -> str | None:
        """Return the prompt that goes before each text.

        Raises:
            InvalidOptionError: see `prepare`.
        """
        if request.truncate_dim is not None and request.truncate_dim > self.dim:
            raise InvalidOptionError("truncate_dim", str(request.truncate_dim), f"at most {self.dim}")
        if request.precision == "int8" and not (self._has_int8 or request.normalize_embeddings):
            allowed = "this model's vectors are of any length: with normalize_embeddings, or its int8_ranges"
            raise InvalidOptionError("precision", "'int8'", allowed)
        return self._prompt(request)

    def run(
        self, batch: Sequence[Encoded]
    ) -> Iterator[tuple[int, NDArray[np.float32] | PenstockError] | None]:
        """Embed a batch; yields (index, vector of float32, shape (dim,)) or the item's error.

        Raises:
            OutOfMemoryError: the batch did not fit; the engine stays usable.
        """
        groups: dict[int | None, list[int]] = {}
        for index, text in enumerate(batch):
            if self._n_rows is not None and text.n_tokens and text.part("input_ids").max() >= self._n_rows:
                # would end the whole batch, and on a card all that follow
                yield index, EngineError(self.name, "a text holds a token that the model lacks")
            elif text.n_tokens:
                groups.setdefault(text.prompt_length, []).append(index)
            else:
                yield index, EngineError(self.name, "its tokenizer finds no token in a text")
        for prompt_length, indices in groups.items():
            vectors = self._forward([batch[i] for i in indices], prompt_length)
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
        """Return the tokens of the smallest batches at which the device is nearly as fast as it gets.

        Larger ones gain nothing, and whoever comes next waits for them. Takes a second or two on a card.

        Returns:
            With them the seconds that one takes; None if not even the smallest fits.
        """
        text = self._longest()
        text = text.of_length(min(TYPICAL_TOKENS, text.n_tokens))
        speeds: dict[int, float] = {}
        for n_tokens in BATCH_TOKENS:
            batch = [text] * max(1, n_tokens // text.n_tokens)
            try:
                self._forward(batch, text.prompt_length)  # the first of a shape has more to do
                began = time.perf_counter()
                for _ in range(3):
                    self._forward(batch, text.prompt_length)
            except OutOfMemoryError:
                break  # what comes close to it is left to the batcher, which learns from a lack of memory
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

    @torch.inference_mode()
    def _forward(self, texts: Sequence[Encoded], prompt_length: int | None) -> NDArray[np.float32]:
        extra: dict[str, Any] = {} if prompt_length is None else {"prompt_length": prompt_length}
        try:
            with own_stream(self._model.device):
                if self._compiled is not None:
                    vectors = self._compiled.embed(self._pad(texts), extra)
                elif self._packed is None:
                    groups = [[text] for text in texts] if self._is_one_by_one else [texts]
                    parts = [self._model({**self._pad(group), **extra}) for group in groups]
                    vectors = torch.cat([part["sentence_embedding"] for part in parts])
                else:
                    vectors = self._packed.embed(texts, extra)
                found: NDArray[np.float32] = download(vectors.float()).numpy()  # (n_texts, dim)
            return found
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(self.name, max(text.n_tokens for text in texts)) from error

    def _pad(self, texts: Sequence[Encoded]) -> dict[str, Tensor]:
        return self._collator.collate(texts, self._model.device)

    def _choose_ranges(self, model: ModelSettings, plain: NDArray[np.float32]) -> None:
        """Settle what int8 vectors mean, for as long as the model is the same."""
        self.int8_ranges, self._has_int8 = choose_ranges(plain), are_unit(plain)
        if model.int8_ranges is not None:
            try:
                self.int8_ranges, self._has_int8 = read_ranges(model.int8_ranges, self.dim), True
            except (OSError, ValueError) as error:
                raise ModelLoadError(self.name, f"int8_ranges: {error}") from error

    def _choose_ways(self, model: ModelSettings, plain: NDArray[np.float32], device: torch.device) -> None:
        """Settle what computes, and in which format: of what gives the probe's vectors the fastest.

        Raises:
            ModelLoadError: what the settings name does not give them.
        """
        kernels = find_kernels(device)
        key = machine_key(
            self.fingerprint or _fingerprint(self._model, model),
            name_device(device),
            torch.get_num_threads(),
            f"{model.engine} {'' if kernels is None else kernels.version}",
        )
        known = recall(key)
        has_products = any(isinstance(module, nn.Linear) for module in self._model.modules())
        is_bfloat16 = model.dtype == "bfloat16" or (
            model.dtype == "auto"
            and has_products
            and has_fast_bfloat16(device)
            and known.get("dtype") != "float32"
        )
        may_compile = device.type == "cpu" and model.dtype != "float16" and is_installed()
        compiled = None
        if model.engine == "openvino" or (
            model.engine == "auto" and may_compile and has_products and known.get("engine") != "torch"
        ):
            compiled = self._compile(model, plain, device, is_bfloat16=is_bfloat16)
        if compiled is not None and "openvino" in (model.engine, known.get("engine")):
            self._compiled, self.dtype = compiled, "bfloat16" if is_bfloat16 else "float32"
            return
        self._pack(plain)
        if self._packed is None:
            self._check_padded(plain)
        products = "torch"
        if is_bfloat16:
            products = self._reduce(plain, is_forced=model.dtype == "bfloat16", known=known)
        if compiled is not None:
            self._race(compiled, is_bfloat16=is_bfloat16)
        self._undo_bfloat16 = lambda: None  # settled: the weights in float32 that it kept are free
        winner = "torch" if self._compiled is None else "openvino"
        remember(key, {"engine": winner, "dtype": self.dtype, "products": products})

    def _pack(self, plain: NDArray[np.float32]) -> None:
        """Leave padding out, if that changes no vector of the probe, and no text sees its neighbours."""
        try:
            self._packed = Packed(self._model)
        except NotImplementedError as error:
            return logger.warning("batches are padded: %s", error, extra={"model": self.name})
        try:
            reason = self._compare(plain)
        except FOREIGN as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            return None
        self._packed.undo()
        self._packed = None
        return logger.warning("batches are padded: %s", reason, extra={"model": self.name})

    def _check_padded(self, plain: NDArray[np.float32]) -> None:
        """Embed texts one by one from now on, if padding changes their vectors."""
        try:
            reason = self._compare(plain)
        except FOREIGN as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if reason is not None:
            self._is_one_by_one = True
            logger.warning("texts are embedded one by one: %s", reason, extra={"model": self.name})

    def _compare(self, plain: NDArray[np.float32]) -> str | None:
        """Return why what is in use now must not be, or None."""
        together = self._probe(is_padded=self.is_padded)
        among_others = self._probe(is_padded=self.is_padded, is_odd_reversed=True)
        worst = _worst_cosine(plain, together)
        if self._compiled is not None:  # traced with two texts
            worst = min(worst, _worst_cosine(plain, self._probe(is_alone=True)))
        if worst < MIN_COSINE:
            return f"{self.batching} vectors differ: cosine {worst:.5f}"
        if not np.allclose(together[::2], among_others[::2], atol=1e-5 * np.abs(together).max()):
            return "a text sees its neighbours"
        return None

    def _compile(
        self, model: ModelSettings, plain: NDArray[np.float32], device: torch.device, *, is_bfloat16: bool
    ) -> Compiled | None:
        """Return the model as a graph, if that changes no vector of the probe; leaves the model as it was.

        Raises:
            ModelLoadError: the settings insist on the graph.
        """
        reason: str | None
        if not is_installed():
            reason = 'it is not installed: pip install "penstock[openvino]"'
        elif device.type != "cpu":
            reason = "it is for processors here"
        elif model.dtype == "float16":
            reason = "it computes in float32 or bfloat16"
        else:
            try:
                texts = self.prepare(EmbedRequest(model=self.name, texts=["a text", "another one"]))
                self._compiled = Compiled(self._model, self._pad(texts), is_bfloat16=is_bfloat16)
                reason = self._compare(plain)
                if reason is None:
                    return self._compiled
            except Exception as error:  # noqa: BLE001  # of a foreign compiler on foreign code
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            finally:
                self._compiled = None
        if model.engine == "openvino":
            raise ModelLoadError(self.name, f"OpenVINO: {reason}")
        logger.warning("torch computes: OpenVINO: %s", reason, extra={"model": self.name})
        return None

    def _race(self, compiled: Compiled, *, is_bfloat16: bool) -> None:
        """Use the graph if it is faster than what is in use."""
        torch_s = self._timed_race()
        self._compiled = compiled
        compiled_s = self._timed_race()
        if compiled_s >= torch_s:
            self._compiled = None
        else:  # what torch had laid out for itself is given back
            self._undo_bfloat16()
            if self._packed is not None:
                self._packed.undo()
                self._packed = None
            self.dtype = "bfloat16" if is_bfloat16 else "float32"
        logger.info(
            "OpenVINO took %.3f s, torch %.3f s: %s is used",
            compiled_s,
            torch_s,
            "torch" if self._compiled is None else "OpenVINO",
            extra={"model": self.name},
        )

    def _timed_race(self) -> float:
        """Return seconds for a pass over batches such as the batcher cuts, best of three."""
        text = self._longest()
        batches = [
            [text.of_length(longest - i * (longest // 8) // n_texts) for i in range(n_texts)]
            for longest, n_texts in ((min(n, text.n_tokens), n_texts) for n, n_texts in RACE)
        ]
        found = []
        for _ in range(1 + 3):  # the first has more to do
            start = time.perf_counter()
            for batch in batches:
                self._forward(batch, text.prompt_length)
            found.append(time.perf_counter() - start)
        return min(found[1:])

    def _reduce(self, plain: NDArray[np.float32], *, is_forced: bool, known: Mapping[str, str]) -> str:
        """Compute products in bfloat16, if vectors keep their directions and, unless settled, come sooner.

        Args:
            plain: vectors of the probe in float32.
            is_forced: float32 will not do.
            known: what was chosen before.

        Returns:
            Whose products are in use.

        Raises:
            ModelLoadError: bfloat16 is asked for, and turns vectors.
        """
        is_settled = is_forced or known.get("dtype") == "bfloat16"
        float32_s = math.inf if is_settled else self._timed_probe()
        self.dtype = "bfloat16"
        # oneDNN's are the faster ones where a processor has tiles for them (AMX)
        ways: dict[str, Callable[[], Callable[[], None]]] = {
            "C": self._fuse,
            "torch": partial(use_bfloat16, self._model),
        }
        candidates = [known["products"]] if known.get("products") in ways else list(ways)
        times: dict[str, float] = {}
        reasons: list[str] = []
        for way in candidates:
            undo = self._try_way(ways[way], plain)
            if isinstance(undo, str):
                reasons += [undo] if undo else []
                continue
            if is_settled and len(candidates) == 1:
                self._undo_bfloat16 = undo
                return way
            times[way] = min(self._timed_probe() for _ in range(3))
            undo()
        for reason in reasons:
            logger.warning("a way to bfloat16 is not used: %s", reason, extra={"model": self.name})
        best = min(times, key=times.__getitem__, default=None)
        if best is not None and times[best] <= float32_s:
            self._undo_bfloat16 = ways[best]()
            return best
        reason = "it is slower here" if times else "; ".join(reasons)
        if is_forced:
            raise ModelLoadError(self.name, f"bfloat16: {reason}")
        self.dtype = "float32"
        logger.warning("float32 is used, not bfloat16: %s", reason, extra={"model": self.name})
        return "torch"

    def _try_way(
        self, begin: Callable[[], Callable[[], None]], plain: NDArray[np.float32]
    ) -> Callable[[], None] | str:
        """Use a way if it keeps the probe's vectors; returns what undoes it, or why it is not used."""
        try:
            undo = begin()
        except NotImplementedError:
            return ""  # there is none for such a model, or on such a machine
        try:
            reason = self._compare(plain)
        except Exception as error:  # noqa: BLE001  # of compilers for cards, too
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if reason is None:
            return undo
        undo()
        return reason

    def _fuse(self) -> Callable[[], None]:
        """Compute the encoder in C, or by kernels for a card; returns what undoes it.

        Raises:
            NotImplementedError: there is none for such a model or machine.
        """
        device = self._model.device
        kernels = find_kernels(device)
        if self._packed is None or (kernels is None and device.type != "cuda"):
            raise NotImplementedError("its own modules compute")
        if kernels is None:
            return self._packed.fuse(partial(BertGpu, n_words=len(self._model.tokenizer)))
        return self._packed.fuse(partial(BertC, kernels=kernels))

    def _timed_probe(self) -> float:
        """Return seconds for the probe, on a card many times over, after it was compared.

        The first has more to do; and a card takes as long for a few texts as for hundreds.
        """
        n_times = 1 if self._model.device.type == "cpu" else CARD_PROBES
        batches = [batch * n_times for batch in self._probe_batches()]
        start = time.perf_counter()
        for batch in batches:
            self._forward(batch, batch[0].prompt_length)
        return time.perf_counter() - start

    def _probe_first(self, device: torch.device) -> NDArray[np.float32]:
        """Embed the probe by the model's own modules; finds out how long a text may be, if it says too much.

        Raises:
            ModelLoadError: it cannot embed.
        """
        try:
            texts = self._probed()
            if not texts:
                raise ModelLoadError(self.name, "its tokenizer finds no token in any text of the probe")
            return self._probe()
        except FOREIGN as error:
            # a card does not go on after an index that is out of its table
            limit = self._find_limit(texts) if device.type == "cpu" else 0
            if not limit:
                raise explain_failure(self.name, error) from error
            logger.warning("model %s: texts are cut at %d tokens, longer ones fail", self.name, limit)
        self._model.max_seq_length = self.max_tokens = limit
        self._tokenizer = TextTokenizer(self._model, self._texts, 1, self._collator.preprocess)
        return self._probe()

    def _find_limit(self, texts: Sequence[Encoded]) -> int:
        """Return the length of the longest text that can be embedded; 0 if not even short ones can."""
        longest = max(texts, key=lambda text: text.n_tokens)

        def fails(n_tokens: int) -> bool:
            try:
                self._forward([longest.of_length(n_tokens)], longest.prompt_length)
            except FOREIGN:
                return True
            return False

        n_tokens = bisect.bisect_left(range(1, longest.n_tokens + 1), True, key=fails)
        return n_tokens if n_tokens >= LEAST_TOKENS else 0

    def _probed(self) -> list[Encoded]:
        """Return the probe's texts, those without a token left out."""
        found = self.prepare(EmbedRequest(model=self.name, texts=list(self._texts)))
        return [text for text in found if text.n_tokens]

    def _longest(self) -> Encoded:
        return max(self._probed(), key=lambda text: text.n_tokens)

    def _probe(
        self, *, is_odd_reversed: bool = False, is_alone: bool = False, is_padded: bool = False
    ) -> NDArray[np.float32]:
        """Embed the probe; shape (n_texts, dim)."""
        texts = self._probed()
        if is_odd_reversed:
            texts = [text.reversed() if i % 2 else text for i, text in enumerate(texts)]
        order = list(range(len(texts)))
        if self._compiled is None and is_padded:  # texts of similar length: padding costs time
            order.sort(key=lambda i: texts[i].n_tokens)
            groups = [order[i : i + N_PADDED] for i in range(0, len(order), N_PADDED)]
        else:
            groups = [[i] for i in order] if is_alone or self._is_plain else [order]
        found = [self._forward([texts[i] for i in group], texts[0].prompt_length) for group in groups]
        return np.concatenate(found)[np.argsort([i for group in groups for i in group])]

    @property
    def _is_plain(self) -> bool:
        return self._packed is None and self._compiled is None

    def _probe_batches(self) -> list[list[Encoded]]:
        """Return the probe as it is timed."""
        texts = self._probed()
        return [[text] for text in texts] if self._is_plain else [texts]


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


def _own_words(tokenizer: object) -> Iterator[str]:
    """Yield texts of what one tokenizer knows: its special tokens, as if somebody typed them, and words."""
    special = getattr(tokenizer, "all_special_tokens", None)
    if special:
        yield f"a {' gate '.join(dict.fromkeys(special))} water"
        return
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    known = inner.get_vocab() if isinstance(inner, Tokenizer) else getattr(inner, "vocab", ())
    yield " ".join(list(known)[:N_OWN_WORDS])


def _fingerprint(model: SentenceTransformer, settings: ModelSettings) -> str:
    """Hash what was loaded; takes less than a second for a gigabyte of weights."""
    # The files' names are not enough: a folder's model may be trained further in place.
    tokenizer: Any = model.tokenizer
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    parts = (settings.source, settings.revision, settings.dtype, model.max_seq_length, model)
    found = hashlib.sha256(repr(parts).encode())
    if isinstance(tokenizer, Tokenizer):
        found.update(tokenizer.to_str().encode())
    elif model.transformers_model is None:  # words, and what each weighs
        first: Any = model[0]
        found.update(repr((getattr(tokenizer, "vocab", None), first.get_config_dict())).encode())
    for key, value in model.state_dict().items():
        found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _worst_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.nan_to_num((a * b).sum(axis=1) / norms, nan=-1).min())
