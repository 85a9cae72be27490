"""Find out how requests to a model can share forward passes, by trying when it is loaded."""

import logging

import torch
from transformers import PreTrainedModel

from penstock_workers.generation.batch_mode import BatchMode
from penstock_workers.generation.forward import Batch

logger = logging.getLogger(__name__)


@torch.inference_mode()
def find_batch_mode(model: PreTrainedModel) -> tuple[BatchMode | None, int]:
    """Find out how requests to this model can share forward passes.

    The model's class does not tell: position ids may be ignored, there may be no KV cache, or states beside
    it. So each mode is tried: a row's logits must not depend on its batch mates, on when they came and went,
    nor on being computed token by token.

    Returns:
        The best mode, None if there is none; and the bytes that a token takes in the KV cache, 0 where that
        is not known.
    """
    for mode in BatchMode:
        try:
            is_same, bytes_per_token = _try_mode(model, mode)
        except Exception:  # whatever a foreign model does with a cache of ours
            logger.debug("cannot share as %s", mode, exc_info=True)
            continue
        if is_same:
            return mode, bytes_per_token
    return None, 0


def _try_mode(model: PreTrainedModel, mode: BatchMode) -> tuple[bool, int]:
    prompts = [[3, 1, 2, 2, 3], [2, 3, 1, 1, 3, 2, 2, 1, 3], [1]]
    batch = Batch(model, is_mergeable=mode.is_continuous)
    if mode.is_continuous:
        _join(model, batch, prompts, mode)
        if mode.can_chunk:
            if batch.has_states:
                # Some models go on from a state as if it were empty; where weights make little of it, no
                # trial tells.
                return False, 0
            _join_from_prefix(model, batch, prompts)
    else:
        prompts = prompts[:1] if mode is BatchMode.ALONE else prompts
        batch.forward(prompts)
    batch.forward([[row + 1] for row in range(len(prompts))])
    order = batch.drop([1] if len(prompts) > 1 else [])
    shared = batch.forward([[2] for _ in order])
    for place, row in enumerate(order):
        ids = torch.tensor([[*prompts[row], row + 1, 2]], device=model.device)
        alone = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        # Far above what rounding does, far below what a wrong position does.
        tolerance = 0.01 if model.dtype == torch.float32 else 0.3
        if not (shared[place] - alone).abs().max() <= tolerance * alone.std():
            return False, 0
    return True, batch.bytes_per_token


def _join(model: PreTrainedModel, batch: Batch, prompts: list[list[int]], mode: BatchMode) -> None:
    """Prefill the first prompt, decode a token, then merge the others; notes the token in `prompts`."""
    for chunk in [prompts[0][:2], prompts[0][2:]] if mode.can_chunk else prompts[:1]:
        batch.forward([chunk])
    batch.forward([[1]])
    prompts[0] = [*prompts[0], 1]
    newcomers = Batch(model, is_mergeable=True)
    newcomers.forward(prompts[1:])
    batch.merge(newcomers)


def _join_from_prefix(model: PreTrainedModel, batch: Batch, prompts: list[list[int]]) -> None:
    """Merge a prompt that begins with a copy of the first one's prefix; adds it to `prompts`."""
    prompts.append([*prompts[0][:2], 3, 1])
    follower = Batch(model, is_mergeable=True)
    follower.copy_prefixes([batch.prefix(0, 2)], 2)
    follower.forward([prompts[-1][2:]])
    batch.merge(follower)
