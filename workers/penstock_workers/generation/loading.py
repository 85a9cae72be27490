"""Load a causal language model: weights, tokenizer, number format, devices."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from penstock.errors import ModelLoadError
from penstock_workers.checkpoint.checks import check_files
from penstock_workers.checkpoint.memory import cache_bytes, check_memory, weights_bytes
from penstock_workers.checkpoint.weights import reading
from penstock_workers.generation.chat_templates import choose_template
from penstock_workers.hardware.device import has_fast_bfloat16, torch_dtype
from penstock_workers.settings import ModelSettings

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
        raise ModelLoadError(name, f"it does not fit on {len(devices)} GPUs: some layers found no place")
    return loaded, tokenizer


def _devices(model: ModelSettings, device: torch.device) -> list[torch.device]:
    """Return the devices that the weights are going to be on."""
    if model.device_map is None or device.type != "cuda":
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


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
