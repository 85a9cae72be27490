"""A causal language model: its files, and rows of tokens that share its forward passes."""

import inspect
import logging
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from penstock.errors import ModelLoadError
from penstock.settings import ModelSettings
from penstock_workers.engines.checkpoint import check_files, reading
from penstock_workers.engines.device import has_fast_bfloat16, torch_dtype
from penstock_workers.engines.memory import cache_bytes, check_memory, weights_bytes
from penstock_workers.generation.chat_templates import choose_template
from penstock_workers.generation.kv_cache import Part, RowCache, order_without

logger = logging.getLogger(__name__)

_UNBOUNDED_TOKENS = 2048  # what Bloom and Mamba were trained on; such models name no limit
_MANY_PARAMETERS = 500_000_000


def load_causal_lm(
    name: str, source: str, model: ModelSettings, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights and tokenizer, ready for inference on `device`.

    Raises:
        ModelLoadError: weights are missing, do not fit into memory, or the tokenizer has tokens that the
            model has not.
        Exception: whatever transformers raises for files that it cannot use.
    """
    where: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    options = check_files(name, source, model)
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    tokenizer.chat_template = choose_template(name, source, model, tokenizer)
    config = AutoConfig.from_pretrained(source, **where)
    if options:
        config._attn_implementation = None  # also for the empty model that is counted
        options["config"] = config
    is_quantised = getattr(config, "quantization_config", None) is not None
    dtype = _choose_dtype(config, model, device, is_quantised=is_quantised)
    devices = _devices(model, device)
    weights, cache = weights_bytes(source, model.revision, dtype), cache_bytes(config, dtype)
    check_memory(name, weights, devices, cache=cache)
    placed: Any = None
    if model.device_map is not None:
        placed = model.device_map
    elif device.type != "cpu":
        if is_quantised:  # such weights cannot be moved
            placed = {"": str(device)}
        else:
            check_memory(name, weights, [torch.device("cpu")])  # the way there
    auto: Any = AutoModelForCausalLM  # its annotations do not know the model's class
    with reading(name) as found:
        loaded = auto.from_pretrained(source, dtype=dtype, device_map=placed, **options, **where)
    found.check_all(name)
    n_rows = loaded.get_input_embeddings().weight.shape[0]
    if not 0 < tokenizer.vocab_size <= n_rows:
        raise ModelLoadError(name, f"the tokenizer has {tokenizer.vocab_size} tokens, the model {n_rows}")
    loaded = loaded.eval().requires_grad_(False)
    if placed is None:
        return loaded.to(device), tokenizer
    used = set(map(str, getattr(loaded, "hf_device_map", {}).values()))  # none where one device holds all
    if device.type == "cuda" and {"cpu", "disk"} & used:
        raise ModelLoadError(name, f"it does not fit on {len(devices)} cards: some layers found no place")
    return loaded, tokenizer


def _devices(model: ModelSettings, device: torch.device) -> list[torch.device]:
    """Return where the weights are going to be."""
    if model.device_map is None or device.type != "cuda":
        return [device]
    return [torch.device("cuda", card) for card in range(torch.cuda.device_count())]


def _choose_dtype(
    config: PreTrainedConfig, model: ModelSettings, device: torch.device, *, is_quantised: bool
) -> torch.dtype:
    if model.dtype != "auto":
        return torch_dtype(model.dtype)
    if is_quantised and isinstance(config.dtype, torch.dtype):
        return config.dtype  # what its kernels were made for
    if device.type == "cuda":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float16
    if device.type != "cpu" or not has_fast_bfloat16(device):
        return torch.float32
    # A step reads every weight once: bfloat16 halves that, which is the time of a large model. In a
    # small one the arithmetic between the weights dominates, and small models suffer more from rounding.
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM  # not annotated
        empty = auto.from_config(config, trust_remote_code=model.trust_remote_code)
    return torch.bfloat16 if empty.num_parameters() > _MANY_PARAMETERS else torch.float32


def context_window(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens prompt and answer may have together."""
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_ctx")]
    limits.append(tokenizer.model_max_length)
    # A tokenizer without a limit says 10**30.
    sane = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1 << 32]
    return min(sane, default=_UNBOUNDED_TOKENS)


def pause_between_layers(model: PreTrainedModel, pause: Callable[[], None]) -> None:
    """Have `pause` called before each layer; never, where a model's own code has other layers."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what each layer in transformers is
            module.register_forward_pre_hook(lambda *_: pause())


class Sharing(StrEnum):
    """How requests to a model can share forward passes, best first."""

    CONTINUOUS = "continuous"
    """They join and leave between any two; a prompt may come in parts, and begin with a copy of another's."""
    WHOLE_PROMPTS = "continuous, prompts whole"
    """They join and leave, but a prompt is one forward pass."""
    STATIC = "static"
    """They begin together; only leaving is possible."""
    ALONE = "one at a time"
    """A neighbour would change the answer."""

    @property
    def joins(self) -> bool:
        """Whether requests join others that are under way."""
        return self in (Sharing.CONTINUOUS, Sharing.WHOLE_PROMPTS)


@torch.inference_mode()
def find_sharing(model: PreTrainedModel) -> tuple[Sharing | None, int]:
    """Find out how requests to this model can share forward passes.

    That cannot be read off a model's class: position ids may be ignored, there may be no cache of keys and
    values, or states beside it. So it is tried: a row's logits must not depend on its neighbours, on when
    they came and went, nor on being computed token by token.

    Returns:
        None if they cannot; and what a token of a row takes in the cache, bytes, 0 where that is not known.
    """
    for sharing in Sharing:
        try:
            is_same, bytes_per_token = _try_out(model, sharing)
        except Exception:  # whatever a foreign model does with a cache of ours
            logger.debug("cannot share as %s", sharing, exc_info=True)
            continue
        if is_same:
            return sharing, bytes_per_token
    return None, 0


def _try_out(model: PreTrainedModel, sharing: Sharing) -> tuple[bool, int]:
    texts = [[3, 1, 2, 2, 3], [2, 3, 1, 1, 3, 2, 2, 1, 3], [1]]
    joins = sharing.joins
    batch = Batch(model, joins=joins)
    if joins:
        for part in [texts[0][:2], texts[0][2:]] if sharing is Sharing.CONTINUOUS else texts[:1]:
            batch.extend([part])
        batch.extend([[1]])
        texts[0] = [*texts[0], 1]
        newcomers = Batch(model, joins=True)
        newcomers.extend(texts[1:])
        batch.join(newcomers)
        if sharing is Sharing.CONTINUOUS:
            if batch.has_states:
                # Some go on from a state as if it were empty; where weights make little of it, no trial
                # tells.
                return False, 0
            texts.append([*texts[0][:2], 3, 1])
            follower = Batch(model, joins=True)
            follower.begin([batch.part(0, 2)], 2)
            follower.extend([texts[-1][2:]])
            batch.join(follower)
    else:
        texts = texts[:1] if sharing is Sharing.ALONE else texts
        batch.extend(texts)
    batch.extend([[row + 1] for row in range(len(texts))])
    order = batch.drop([1] if len(texts) > 1 else [])
    shared = batch.extend([[2] for _ in order])
    for place, row in enumerate(order):
        ids = torch.tensor([[*texts[row], row + 1, 2]], device=model.device)
        alone = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        # Far above what rounding does, far below what a wrong position does.
        tolerance = 0.01 if model.dtype == torch.float32 else 0.3
        if not (shared[place] - alone).abs().max() <= tolerance * alone.std():
            return False, 0
    return True, batch.bytes_per_token


class Batch:
    """Rows that share forward passes: inputs padded on the left, keys and values in one cache.

    Args:
        model: ready for inference.
        joins: whether other batches are going to join it; takes a cache of ours, which not every model can.

    Attributes:
        lengths: tokens that each row has in the cache.
    """

    def __init__(self, model: PreTrainedModel, *, joins: bool) -> None:
        config = model.config.get_text_config(decoder=True)
        self.lengths: list[int] = []
        self._model = model
        self._cache = RowCache(config) if joins else DynamicCache(config=config)
        self._width = 0
        self._known = set(inspect.signature(model.forward).parameters)

    @property
    def bytes_per_token(self) -> int:
        """What one more token of a row takes in the cache, bytes."""
        return self._cache.bytes_per_token if isinstance(self._cache, RowCache) else 0

    @property
    def n_cells(self) -> int:
        """What the cache has allocated, in tokens; 0 where it is not ours."""
        return self._cache.n_cells if isinstance(self._cache, RowCache) else 0

    @property
    def has_states(self) -> bool:
        """Whether layers keep a state that every token changes, besides or instead of keys and values."""
        return any(self._cache.is_linear)

    @property
    def n_bytes(self) -> int:
        """What the cache has allocated, bytes; 0 where it is not ours."""
        return self._cache.n_bytes if isinstance(self._cache, RowCache) else 0

    @torch.inference_mode()
    def extend(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Run each row's next tokens.

        Args:
            ids: for each row; of different length only for rows that have no tokens yet, and these may be
                shorter than the others'.

        Returns:
            Logits of the token after them; float32, shape (n_rows, vocab), on the model's device.
        """
        is_first, device = not self._width, self._model.device
        n_new = max(map(len, ids))
        lengths = [n + len(row) for n, row in zip(self.lengths or [0] * len(ids), ids, strict=True)]
        width = self._width + n_new
        padded = torch.tensor([[0] * (n_new - len(row)) + list(row) for row in ids], device=device)
        # A row's own tokens are the last columns; its positions count them, so that padding moves nothing.
        begin = width - torch.tensor(lengths, device=device)[:, None]
        columns = torch.arange(width, device=device)
        # Each model takes some of these: one with ALiBi no positions, a state-space one `cache_params`.
        # The latter has no keys to mask after its prompt, and would mask the new tokens instead.
        masks = is_first or "cache_params" not in self._known
        inputs: dict[str, Any] = {
            "attention_mask": (columns >= begin).long() if masks else None,
            "position_ids": (columns[-n_new:] - begin).clamp(min=0),
            "past_key_values": self._cache,
            "cache_params": self._cache,
            "logits_to_keep": 1,
        }
        inputs = {name: value for name, value in inputs.items() if name in self._known}
        if isinstance(self._cache, RowCache):
            self._cache.open(len(ids), n_new)
        logits: Tensor = self._model(input_ids=padded, use_cache=True, **inputs).logits[:, -1].float()
        if isinstance(self._cache, RowCache):
            self._cache.advance(n_new)
        self.lengths, self._width = lengths, width
        return logits

    def part(self, row: int, n_tokens: int) -> Part:
        """Say where the first tokens of a row are."""
        assert isinstance(self._cache, RowCache)
        return Part(self._cache, row, self._cache.grid.end - self.lengths[row], n_tokens)

    @torch.inference_mode()
    def begin(self, parts: Sequence[Part | None], n_new: int) -> None:
        """Give the rows of an empty batch their first tokens, if there are any; see `RowCache.begin`."""
        if any(parts):
            assert isinstance(self._cache, RowCache)
            self._cache.begin(parts, n_new)
            self.lengths = [part.n_tokens if part else 0 for part in parts]
            self._width = max(self.lengths)

    @torch.inference_mode()
    def spread(self, order: Sequence[int]) -> None:
        """Put the rows of `order` at its places; a row may be at several."""
        self.lengths = [self.lengths[row] for row in order]
        if isinstance(self._cache, RowCache):
            self._cache.spread(order)
        else:
            self._reorder(order)

    @torch.inference_mode()
    def join(self, other: "Batch") -> None:
        """Take over the rows of another batch, behind our own; it is not to be used again."""
        assert isinstance(self._cache, RowCache)
        assert isinstance(other._cache, RowCache)
        self._cache.join(other._cache)
        self.lengths += other.lengths
        self._width = max(self._width, other._width)

    @torch.inference_mode()
    def drop(self, gone: Collection[int]) -> list[int]:
        """Drop rows, not all of them; return which row is now at which place."""
        order = order_without(len(self.lengths), gone)
        self.lengths = [self.lengths[row] for row in order]
        if isinstance(self._cache, RowCache):
            self._width = max(self.lengths)
            self._cache.move(order, self._width)
        else:
            self._reorder(order)
        return order

    def _reorder(self, order: Sequence[int]) -> None:
        # Not `batch_select_indices`: layers with a recurrent state have none, and all can be reordered.
        self._cache.reorder_cache(torch.tensor(order, device=self._model.device))  # type: ignore[arg-type]  # annotated with the legacy LongTensor
