"""A causal language model: its files, and rows of tokens that share its forward passes."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from penstock.errors import ModelLoadError
from penstock.settings import ModelSettings
from penstock_workers.engines.device import has_fast_bfloat16, torch_dtype

_UNBOUNDED_TOKENS = 2048  # what Bloom and Mamba were trained on; such models name no limit
_MANY_PARAMETERS = 500_000_000


def load_causal_lm(
    name: str, source: str, model: ModelSettings, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights and tokenizer, ready for inference on `device`.

    Raises:
        ModelLoadError: weights are missing, or the tokenizer has tokens that the model has not.
        Exception: whatever transformers raises for files that it cannot use.
    """
    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    dtype = _choose_dtype(source, model, device)
    auto: Any = AutoModelForCausalLM  # its annotations know neither the report nor the model's class
    loaded, report = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **where)
    # transformers fills what is missing with random numbers, and warns.
    if missing := sorted(report["missing_keys"]):
        raise ModelLoadError(name, f"{len(missing)} weights are missing, the first is {missing[0]}")
    n_rows = loaded.get_input_embeddings().weight.shape[0]
    if not 0 < tokenizer.vocab_size <= n_rows:
        raise ModelLoadError(name, f"the tokenizer has {tokenizer.vocab_size} tokens, the model {n_rows}")
    return loaded.eval().requires_grad_(False).to(device), tokenizer


def _choose_dtype(source: str, model: ModelSettings, device: torch.device) -> torch.dtype:
    if model.dtype != "auto":
        return torch_dtype(model.dtype)
    if device.type == "cuda":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float16
    if device.type != "cpu" or not has_fast_bfloat16(device):
        return torch.float32
    # A step reads every weight once: bfloat16 halves that, which is the time of a large model. In a
    # small one the arithmetic between the weights dominates, and small models suffer more from rounding.
    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config = AutoConfig.from_pretrained(source, **where)
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


class Batch:
    """Rows that share forward passes: inputs padded on the left, keys and values in one cache."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        width = max(map(len, prompts))
        padded = [[0] * (width - len(ids)) + list(ids) for ids in prompts]
        real = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        self._model = model
        self._ids = torch.tensor(padded, device=model.device)  # (batch, n_tokens)
        self._mask = torch.tensor(real, device=model.device)  # (batch, n_tokens so far)
        # Positions count a row's own tokens, so that padding does not move it.
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self._known = set(inspect.signature(model.forward).parameters)

    @torch.inference_mode()
    def forward(self) -> Tensor:
        """Return the logits of each row's next token; float32 on the CPU, shape (batch, vocab)."""
        # Each model takes some of these: one with ALiBi no positions, a state-space one `cache_params`.
        # The latter has no keys to mask after its prompt, and would mask the new tokens instead.
        is_prompt = self._ids.shape == self._mask.shape
        inputs: dict[str, Any] = {
            "attention_mask": None if "cache_params" in self._known and not is_prompt else self._mask,
            "position_ids": self._positions,
            "past_key_values": self._cache,
            "cache_params": self._cache,
            "logits_to_keep": 1,
        }
        inputs = {name: value for name, value in inputs.items() if name in self._known}
        out = self._model(input_ids=self._ids, use_cache=True, **inputs)
        logits: Tensor = out.logits[:, -1].float().cpu()
        return logits

    def append(self, tokens: list[int]) -> None:
        """Give each row its newest token, the input of the next step."""
        self._ids = torch.tensor(tokens, device=self._ids.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=-1)
        self._positions = self._positions[:, -1:] + 1

    @torch.inference_mode()
    def keep(self, places: list[int]) -> None:
        """Drop all rows but these."""
        chosen = torch.tensor(places, dtype=torch.long, device=self._ids.device)
        self._mask, self._positions = self._mask[chosen], self._positions[chosen]
        # Not `batch_select_indices`: layers with a recurrent state have none, and all can be reordered.
        self._cache.reorder_cache(chosen)  # type: ignore[arg-type]  # annotated with the legacy LongTensor
