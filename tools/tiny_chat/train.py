"""Train tiny-chat from nothing, print what it gets right, and save it.

Usage: python -m tools.tiny_chat.train [--out DIR] [--minutes N] [--seed N]
    [--start DIR] [--quick]
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn import Parameter, functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from penstock_workers.bundled import bundled_folder
from tools.tiny_chat.exam import examine, render
from tools.tiny_chat.text import Conversation, conversations
from tools.tiny_chat.tokens import ASSISTANT, train_tokenizer

_MUON_RATE = 0.02
_ADAMW_RATE = 3e-3
_WARMUP_SHARE = 0.03
# A trained model goes on at a lower rate, so that it keeps what it knows.
_RESTART_SHARE = 0.5
# Conversations are sorted by length within a pool, so that a batch has little padding.
_POOL = 2048
_BATCH_TOKENS = 6144
_UNLEARNT = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Conversations of about one length, padded at the end.

    Attributes:
        input_ids: int64, shape (batch, n_tokens).
        labels: int64, shape (batch, n_tokens); -100 where nothing is learnt.
    """

    input_ids: Tensor
    labels: Tensor


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=bundled_folder("tiny-chat"), help="Folder to write."
)
@click.option("--minutes", default=25.0, show_default=True, help="Time to train for.")
@click.option("--seed", default=1, show_default=True)
@click.option(
    "--start", type=click.Path(path_type=Path), help="Saved folder to go on from, instead of nothing."
)
@click.option("--quick", is_flag=True, help="Half a minute, to see that it runs.")
def main(out: Path, minutes: float, seed: int, start: Path | None, quick: bool) -> None:
    """Train tiny-chat, from nothing or further; save it and examine what was saved."""
    torch.manual_seed(seed)
    if start is None:
        tokenizer = train_tokenizer(seed=seed)
        model = new_model(tokenizer)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    peak_share = 1.0 if start is None else _RESTART_SHARE
    train(model, tokenizer, seed=seed, minutes=0.5 if quick else minutes, peak_share=peak_share)
    save(model, tokenizer, out)
    click.echo(examine(out, per_family=10 if quick else 200).as_markdown())


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    minutes: float,
    peak_share: float,
) -> None:
    """Train `model` in place for `minutes`, on every answer of fresh conversations.

    Args:
        model: changed in place; left in evaluation mode.
        tokenizer: the one the model's vocabulary is made for.
        seed: of the conversations; another seed gives others.
        minutes: time to train for; the learning rate falls to zero at its end.
        peak_share: the highest learning rate, as a share of that for a new model, 0 to 1.
    """
    tuned = _optimizers(model)
    started, deadline_s = time.monotonic(), minutes * 60
    # At these lengths plain attention trains half as fast again as the fused kernel on a CPU.
    model.set_attn_implementation("eager")
    model.train()
    for step, batch in enumerate(_batches(tokenizer, seed=seed)):
        elapsed_s = time.monotonic() - started
        if elapsed_s >= deadline_s:
            break
        loss = _learn(model, tuned, batch, rate_share=peak_share * _rate_share(elapsed_s / deadline_s))
        if step % 50 == 0:
            click.echo(f"step {step}  {elapsed_s:.0f} s  loss {loss:.4f}")
    model.eval()  # type: ignore[no-untyped-call]  # transformers leaves it untyped


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # as above
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rate_share(progress: float) -> float:
    """Warm up linearly, then follow a cosine to zero; both in shares of the peak rate."""
    if progress < _WARMUP_SHARE:
        return progress / _WARMUP_SHARE
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP_SHARE) / (1 - _WARMUP_SHARE)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tuned:
    """An optimizer and the learning rate that it reaches after the warm-up."""

    optimizer: torch.optim.Optimizer
    peak_rate: float


def _optimizers(model: LlamaForCausalLM) -> list[_Tuned]:
    """Give the layers' matrices to Muon, embedding and norms to AdamW.

    In 150 steps AdamW alone came to a loss of 1.67 and this pair to 1.07.

    Source: rates and momentum after Jordan et al. 2024, "Muon: An optimizer for hidden layers".
    """
    embedding_and_norms: list[Parameter] = []
    matrices: list[Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else embedding_and_norms).append(parameter)
    muon = torch.optim.Muon(matrices, lr=_MUON_RATE, weight_decay=0.05, momentum=0.95, nesterov=True)
    adamw = torch.optim.AdamW(embedding_and_norms, lr=_ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    return [
        _Tuned(optimizer=muon, peak_rate=_MUON_RATE),
        _Tuned(optimizer=adamw, peak_rate=_ADAMW_RATE),
    ]


def _learn(model: LlamaForCausalLM, tuned: list[_Tuned], batch: _Batch, *, rate_share: float) -> float:
    """Take one step and return the loss before it."""
    loss = _loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for one in tuned:
        for group in one.optimizer.param_groups:
            group["lr"] = one.peak_rate * rate_share
        one.optimizer.step()
        one.optimizer.zero_grad()
    return loss.item()


def _loss(model: LlamaForCausalLM, batch: _Batch) -> Tensor:
    """Average the cross-entropy over the tokens to learn; float32, shape ()."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        targets = batch.labels[:, 1:]
        is_learnt = targets != _UNLEARNT  # (batch, n_tokens - 1)
        # Only the position before a token to learn needs a row of logits.
        logits = model.lm_head(hidden[:, :-1][is_learnt])  # (n_learnt, vocab)
    return functional.cross_entropy(logits.float(), targets[is_learnt])


def _batches(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Iterator[_Batch]:
    """Yield batches of fresh conversations without end."""
    drawn, rng = conversations(seed, "train"), random.Random(seed)
    while True:
        batches = list(_grouped(_encode(tokenizer, list(islice(drawn, _POOL)))))
        rng.shuffle(batches)
        yield from (_padded(tokenizer, rows) for rows in batches)


def _grouped(rows: list[list[int]]) -> Iterator[list[list[int]]]:
    """Group rows of about one length, up to `_BATCH_TOKENS` a group with padding."""
    group: list[list[int]] = []
    for row in sorted(rows, key=len):
        if group and len(row) * (len(group) + 1) > _BATCH_TOKENS:
            yield group
            group = []
        group.append(row)
    yield group


def _encode(tokenizer: PreTrainedTokenizerFast, drawn: list[Conversation]) -> list[list[int]]:
    texts = [render(tokenizer, conversation.messages, conversation.answer) for conversation in drawn]
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return rows


def _padded(tokenizer: PreTrainedTokenizerFast, rows: list[list[int]]) -> _Batch:
    # Padding at the end needs no mask: a causal model never looks ahead.
    n_tokens = max(map(len, rows))
    input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (n_tokens - len(row)) for row in rows])
    return _Batch(
        input_ids=input_ids, labels=torch.where(_is_answer(tokenizer, input_ids), input_ids, _UNLEARNT)
    )


def _is_answer(tokenizer: PreTrainedTokenizerFast, input_ids: Tensor) -> Tensor:
    """Mark the tokens of every answer, its end included; bool, shape (batch, n_tokens)."""
    places = torch.arange(1, input_ids.shape[1] + 1)
    is_opening = input_ids == tokenizer.convert_tokens_to_ids(ASSISTANT)
    last_opening = torch.cummax(is_opening * places, dim=1).values
    last_end = torch.cummax((input_ids == tokenizer.eos_token_id) * places, dim=1).values
    # The end belongs to the answer, so a token looks at the ends before it.
    last_end = functional.pad(last_end, (1, 0))[:, :-1]
    return (last_opening > last_end) & ~is_opening


if __name__ == "__main__":
    main()
