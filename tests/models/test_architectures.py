import random

import pytest
import torch
from transformers import PreTrainedModel

from penstock_workers.generation.causal_lm import Sharing, find_sharing
from penstock_workers.generation.decoding import Decoding, Row
from penstock_workers.generation.sampling import Sampling, Trail
from tests.models.architectures import ARCHITECTURES, END, build

GREEDY = Sampling(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, seed=1
)
REFUSED = {"minimax", "rwkv"}  # keep their state where nobody can reach it
LESS_THAN_CONTINUOUS = {
    "mamba": Sharing.WHOLE_PROMPTS,
    "mamba2": Sharing.WHOLE_PROMPTS,
    "jamba": Sharing.WHOLE_PROMPTS,
    "qwen3_next": Sharing.WHOLE_PROMPTS,
    "lfm2": Sharing.WHOLE_PROMPTS,
    "granitemoehybrid": Sharing.WHOLE_PROMPTS,
    "recurrent_gemma": Sharing.ALONE,
}

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about kernels and lengths


def tokens_alone(model: PreTrainedModel, trail: Trail, max_new_tokens: int) -> list[int]:
    """Return what transformers itself generates for this prompt alone, greedily, the end included."""
    ids = torch.tensor([trail.prompt])
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
def test_greedy_tokens_equal_transformers_own(name: str) -> None:
    """Requests that come and go at random get token for token what `generate` gives each alone.

    Some prompts begin alike, some are equal.
    """
    torch.set_num_threads(1)
    model, dice = build(name), random.Random(1)
    sharing, _ = find_sharing(model)
    assert sharing is LESS_THAN_CONTINUOUS.get(name, Sharing.CONTINUOUS)
    decoding: Decoding[str] = Decoding(name, model, sharing, max_rows=5, budget_tokens=1 << 20)
    decoding._prompt_tokens = lambda: 32  # type: ignore[method-assign]  # so that long prompts have parts
    system = [dice.randrange(2, 320) for _ in range(90)]
    prompts = [
        [
            *(system if n % 3 == 0 else []),
            *(dice.randrange(2, 320) for _ in range(dice.choice([2, 5, 23, 70]))),
        ]
        for n in range(18)
    ]
    prompts[9:9] = prompts[7:9] * 2
    trails = [Trail(sampling=GREEDY, prompt=prompt) for prompt in prompts]
    limits = [dice.choice([1, 3, 8, 20, 33]) for _ in trails]

    coming = list(zip(trails, limits, strict=True))
    while coming or not decoding.is_idle:
        while coming and (dice.random() < 0.3 or decoding.is_idle):
            decoding.add(row_of(*coming.pop(0)))
        assert {outcome for _, outcome in decoding.step()} <= {"ended"}

    expected = [tokens_alone(model, t, n) for t, n in zip(trails, limits, strict=True)]
    assert [trail.tokens for trail in trails] == expected


def row_of(trail: Trail, max_new_tokens: int) -> Row[str]:
    """Return a row that ends at the end token or the limit."""

    def take(token: int) -> str | None:
        return "ended" if token == END or len(trail.tokens) == max_new_tokens else None

    return Row(trail, max_new_tokens, take=take)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_that_cannot_share_are_found_out(name: str) -> None:
    """A model whose rows cannot share forward passes in any way is told apart when it is loaded."""
    assert find_sharing(build(name)) == (None, 0)


def test_joining_is_given_up_where_a_layer_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of cache layer that nobody knows here leaves static batches, which give the same tokens."""
    model = build("llama")
    monkeypatch.setattr("penstock_workers.generation.kv_cache.DynamicLayer", Row)  # no layer is of this kind

    sharing, _ = find_sharing(model)

    assert sharing is Sharing.STATIC
    decoding: Decoding[str] = Decoding("llama", model, sharing, max_rows=3, budget_tokens=1 << 20)
    trails = [Trail(sampling=GREEDY, prompt=[3 + n, *range(5, 10 + 2 * n)]) for n in range(7)]
    for n, trail in enumerate(trails):
        decoding.add(row_of(trail, 3 + 5 * n))
    while not decoding.is_idle:
        decoding.step()
    assert [t.tokens for t in trails] == [tokens_alone(model, t, 3 + 5 * n) for n, t in enumerate(trails)]
