"""Models that say what a test wants, token for token."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase


def make_scripted(
    folder: Path, tokenizer: PreTrainedTokenizerBase, said: Sequence[int], n_prompt: int, *, end: int = 1
) -> Path:
    """Write a GPT-2 whose next token depends on its position alone.

    Args:
        folder: where to.
        tokenizer: of the model.
        said: what it says behind a prompt, then the end.
        n_prompt: tokens of that prompt.
        end: the end token.
    """
    n_positions = 256 * -(-(n_prompt + len(said) + 2) // 256)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=n_positions,
        n_layer=1,
        n_head=4,
        n_positions=n_positions,
        n_inner=8,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        transformer = model.transformer
        transformer.wpe.weight.copy_(torch.eye(n_positions) * 10)
        for norm in (transformer.ln_f, transformer.h[0].ln_1, transformer.h[0].ln_2):
            norm.weight.fill_(1.0)
        for place in range(n_positions):
            step = place - (n_prompt - 1)
            model.lm_head.weight[said[step] if 0 <= step < len(said) else end, place] = 1.0
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
