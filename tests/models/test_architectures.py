import random

import pytest
import torch
from transformers import PreTrainedModel

from penstock_workers.generation.batch_mode import BatchMode
from penstock_workers.generation.decoding import Decoding
from penstock_workers.generation.mode_trial import find_batch_mode
from penstock_workers.generation.prefill_budget import PrefillBudget
from penstock_workers.generation.sampling_params import SamplingParams
from penstock_workers.generation.sequence import ScheduledSequence, TokenSequence
from tests.models.architectures import ARCHITECTURES, END, build

GREEDY = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, seed=1
)
REFUSED = {"minimax", "rwkv"}  # keep their state where nobody can reach it
LESS_THAN_CONTINUOUS = {
    "mamba": BatchMode.WHOLE_PROMPTS,
    "mamba2": BatchMode.WHOLE_PROMPTS,
    "jamba": BatchMode.WHOLE_PROMPTS,
    "qwen3_next": BatchMode.WHOLE_PROMPTS,
    "lfm2": BatchMode.WHOLE_PROMPTS,
    "granitemoehybrid": BatchMode.WHOLE_PROMPTS,
    "recurrent_gemma": BatchMode.ALONE,
}

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about kernels and lengths


def tokens_alone(model: PreTrainedModel, tokens: TokenSequence, max_new_tokens: int) -> list[int]:
    """Return what transformers itself generates for this prompt alone, greedily, the end included."""
    ids = torch.tensor([tokens.prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=END,
    )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - REFUSED))
def test_greedy_tokens_equal_transformers_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come and go at random get token for token what `generate` gives each alone.

    Some prompts begin alike, some are equal.
    """
    torch.set_num_threads(1)
    monkeypatch.setattr(PrefillBudget, "n_tokens", 32)  # so that long prompts have chunks
    model, dice = build(name), random.Random(1)
    mode, _ = find_batch_mode(model)
    assert mode is LESS_THAN_CONTINUOUS.get(name, BatchMode.CONTINUOUS)
    decoding: Decoding[str] = Decoding(name, model, mode, max_rows=5, budget_tokens=1 << 20)
    system = [dice.randrange(2, 320) for _ in range(90)]
    prompts = [
        [
            *(system if n % 3 == 0 else []),
            *(dice.randrange(2, 320) for _ in range(dice.choice([2, 5, 23, 70]))),
        ]
        for n in range(18)
    ]
    prompts[9:9] = prompts[7:9] * 2
    sequences = [TokenSequence(sampling=GREEDY, prompt=prompt) for prompt in prompts]
    limits = [dice.choice([1, 3, 8, 20, 33]) for _ in sequences]

    coming = list(zip(sequences, limits, strict=True))
    while coming or not decoding.is_idle:
        while coming and (dice.random() < 0.3 or decoding.is_idle):
            decoding.add(row_of(*coming.pop(0)))
        assert {outcome for _, outcome in decoding.step()} <= {"ended"}

    expected = [tokens_alone(model, t, n) for t, n in zip(sequences, limits, strict=True)]
    assert [tokens.output for tokens in sequences] == expected


def row_of(tokens: TokenSequence, max_new_tokens: int) -> ScheduledSequence[str]:
    """Return a row that ends at the end token or the limit."""

    def take(token: int) -> str | None:
        return "ended" if token == END or len(tokens.output) == max_new_tokens else None

    return ScheduledSequence(tokens, max_new_tokens, take=take)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_that_cannot_share_are_found_out(name: str) -> None:
    """A model whose rows cannot share forward passes in any way is told apart when it is loaded."""
    assert find_batch_mode(build(name)) == (None, 0)


def test_joining_is_given_up_where_a_layer_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of cache layer that nobody knows here leaves static batches, which give the same tokens."""
    model = build("llama")
    # no layer is of this kind
    monkeypatch.setattr("penstock_workers.generation.kv_cache.DynamicLayer", Decoding)

    mode, _ = find_batch_mode(model)

    assert mode is BatchMode.STATIC
    decoding: Decoding[str] = Decoding("llama", model, mode, max_rows=3, budget_tokens=1 << 20)
    sequences = [TokenSequence(sampling=GREEDY, prompt=[3 + n, *range(5, 10 + 2 * n)]) for n in range(7)]
    for n, tokens in enumerate(sequences):
        decoding.add(row_of(tokens, 3 + 5 * n))
    while not decoding.is_idle:
        decoding.step()
    assert [t.output for t in sequences] == [
        tokens_alone(model, t, 3 + 5 * n) for n, t in enumerate(sequences)
    ]
