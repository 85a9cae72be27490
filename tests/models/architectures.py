"""Small random models of many architectures: every kind of cache, mask and position that generation meets."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

END = 1
"""The end token of all of them."""

# Large weights give decisive logits: rounding must not choose between tokens.
_SIZES: dict[str, Any] = {
    "initializer_range": 0.3,
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": END,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 64}
_LINEAR = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window of 8": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a window in one layer": ("qwen2", {**_MIXED, "use_sliding_window": True}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {**_LINEAR, "decoder_sparse_step": 1}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {"head_dim": 8, **_MIXED}),
    "mixtral": ("mixtral", _EXPERTS),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "granite": ("granite", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", _MIXED),
    "exaone4": ("exaone4", _MIXED),
    "starcoder2 with a window of 8": ("starcoder2", {"sliding_window": 8}),
    "stablelm": ("stablelm", {}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "falcon": ("falcon", {"alibi": False}),
    "falcon with ALiBi": ("falcon", {"alibi": True}),
    "gpt_oss": ("gpt_oss", {**_EXPERTS, **_MIXED, "head_dim": 8}),
    "llama4 in chunks of 8": (
        "llama4_text",
        {
            **_EXPERTS,
            "head_dim": 8,
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
        },
    ),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    "jamba": (
        "jamba",
        {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": ("qwen3_next", {**_LINEAR, "layer_types": ["linear_attention", "full_attention"]}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_EXPERTS,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "shared_intermediate_size": 64,
            "position_embedding_type": "rope",
        },
    ),
    "minimax": (
        "minimax",
        {**_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "block_size": 16},
    ),
    "rwkv": ("rwkv", {"attention_hidden_size": 32, "context_length": 512}),
    "bert as a decoder": ("bert", {"is_decoder": True}),
}
"""Name -> model type and fields of its configuration."""


def build(name: str) -> PreTrainedModel:
    """Return a random model of that architecture."""
    torch.manual_seed(5)
    kind, fields = ARCHITECTURES[name]
    config = CONFIG_MAPPING[kind](**_SIZES | fields)
    make: Callable[[Any], PreTrainedModel] = AutoModelForCausalLM.from_config
    return make(config).eval().requires_grad_(False)
