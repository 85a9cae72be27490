import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from penstock.errors import EngineError, OutOfMemoryError
from penstock_workers.generation.batch_mode import BatchMode
from penstock_workers.generation.decoding import Decoding
from penstock_workers.generation.mode_trial import find_batch_mode
from penstock_workers.generation.prefill_budget import PrefillBudget
from penstock_workers.generation.sampling_params import SamplingParams
from penstock_workers.generation.sequence import ScheduledSequence, TokenSequence
from tests.models.architectures import build

GREEDY = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, seed=1
)
DONE = "done"


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """Return a small random Llama."""
    torch.set_num_threads(1)
    return build("llama")


@pytest.fixture
def spoil(llama: PreTrainedModel) -> Iterator[Callable[[Callable[[torch.Tensor, Any], None]], None]]:
    """Return a function that lets a check of (input ids, cache) fail forward passes."""
    hooks = []

    def add(check: Callable[[torch.Tensor, Any], None]) -> None:
        hooks.append(
            llama.register_forward_pre_hook(
                lambda _module, _args, kwargs: check(kwargs["input_ids"], kwargs["past_key_values"]),
                with_kwargs=True,
            )
        )

    yield add
    for hook in hooks:
        hook.remove()


def start(model: PreTrainedModel, *, max_rows: int = 8, budget_tokens: int = 1 << 20) -> Decoding[str]:
    """Return an empty batch."""
    return Decoding("llama", model, BatchMode.CONTINUOUS, max_rows=max_rows, budget_tokens=budget_tokens)


def make_sequence(
    prompt: list[int],
    n_new: int,
    sampling: SamplingParams = GREEDY,
    is_over: Callable[[], bool] = lambda: False,
) -> ScheduledSequence[str]:
    """Return a sequence that ends after `n_new` tokens."""
    tokens = TokenSequence(sampling=sampling, prompt=prompt)
    return ScheduledSequence(
        tokens, n_new, take=lambda _: DONE if len(tokens.output) == n_new else None, is_over=is_over
    )


def make_sequences(
    n: int, sampling: SamplingParams = GREEDY, *, seed: int = 3
) -> list[ScheduledSequence[str]]:
    """Return sequences of different lengths."""
    dice = random.Random(seed)
    return [
        make_sequence(
            [dice.randrange(8, 320) for _ in range(dice.randrange(1, 60))],
            dice.randrange(1, 30),
            replace(sampling, seed=index),
        )
        for index in range(n)
    ]


def run(
    decoding: Decoding[str], sequences: list[ScheduledSequence[str]]
) -> dict[ScheduledSequence[str], object]:
    """Run all sequences to their ends."""
    for sequence in sequences:
        decoding.add(sequence)
    outcomes: dict[ScheduledSequence[str], object] = {}
    while not decoding.is_idle:
        outcomes |= dict(decoding.step())
    return outcomes


def tokens_alone(model: PreTrainedModel, sequences: list[ScheduledSequence[str]]) -> list[list[int]]:
    """Return what each sequence gets in a batch of its own."""
    copies = [
        make_sequence(list(sequence.tokens.prompt), sequence.max_new_tokens, sequence.tokens.sampling)
        for sequence in sequences
    ]
    for copy in copies:
        assert run(start(model), [copy]) == {copy: DONE}
    return [copy.tokens.output for copy in copies]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 40, "repetition_penalty": 1.3},
        {"temperature": 1.5, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1.0, "presence_penalty": 1.5},
        {"repetition_penalty": 1.5, "presence_penalty": -0.5},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_batch_mates(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    """Whoever comes and goes meanwhile, a request gets the tokens that it gets alone."""
    sequences = make_sequences(40, replace(GREEDY, **options))

    outcomes = run(start(llama), sequences)

    assert set(outcomes.values()) == {DONE}
    assert [sequence.tokens.output for sequence in sequences] == tokens_alone(llama, sequences)


def test_who_is_over_leaves_within_a_step(llama: PreTrainedModel) -> None:
    """A cancelled sequence gets no further token, and the next one has its place one step later."""
    over: set[str] = set()
    first = make_sequence([9, 8, 7], 50, is_over=lambda: "first" in over)
    waiting = make_sequence([9, 9], 50, is_over=lambda: "waiting" in over)
    last = make_sequence([5, 5, 5], 2)
    decoding = start(llama, max_rows=1)
    for sequence in (first, waiting, last):
        decoding.add(sequence)
    for _ in range(4):
        decoding.step()

    over |= {"first", "waiting"}
    decoding.step()
    outcomes = decoding.step()

    assert len(first.tokens.output) == 4
    assert waiting.tokens.output == []
    assert outcomes == [(last, DONE)]
    assert decoding.is_idle


def test_long_prompt_does_not_stop_others(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a long prompt is prefilled in chunks, others get a token a step and short ones are admitted."""
    decoding = start(llama)
    monkeypatch.setattr(PrefillBudget, "n_tokens", 32)  # measured otherwise
    running, long, short = (
        make_sequence([9], 30),
        make_sequence(list(range(8, 308)), 3),
        make_sequence([7, 6], 3),
    )
    decoding.add(running)
    decoding.step()
    for sequence in (long, short):
        decoding.add(sequence)

    for n in range(2, 10):
        decoding.step()
        assert len(running.tokens.output) == n

    assert len(short.tokens.output) == 3
    assert long.tokens.output == []
    assert set(run(decoding, []).values()) == {DONE}
    assert [long.tokens.output] == tokens_alone(llama, [long])


def test_cache_stays_within_its_budget(llama: PreTrainedModel) -> None:
    """Rows wait where the cache would grow past the budget; when all have left, nothing is held."""
    _, bytes_per_token = find_batch_mode(llama)
    decoding, sequences = start(llama, max_rows=32, budget_tokens=1500), make_sequences(40)
    for sequence in sequences:
        decoding.add(sequence)
    held, n_running = [], []

    while not decoding.is_idle:
        decoding.step()
        held.append(decoding.cache_bytes)
        n_running.append(decoding.n_running)

    assert max(held) <= 1500 * bytes_per_token
    assert 3 <= max(n_running) < 32
    assert held[-1] == 0
    assert [sequence.tokens.output for sequence in sequences] == tokens_alone(llama, sequences)


def test_row_beyond_the_budget_runs_alone(llama: PreTrainedModel) -> None:
    """A budget never keeps a request out that could be answered alone."""
    sequences = make_sequences(3)

    assert set(run(start(llama, budget_tokens=1), sequences).values()) == {DONE}


@pytest.mark.parametrize("where", ["prompts", "steps"])
def test_out_of_memory_is_learned(
    llama: PreTrainedModel, spoil: Callable[[Callable[[torch.Tensor, Any], None]], None], where: str
) -> None:
    """Rows that do not fit leave, come back, and lose nothing; the budget is lower from then on."""
    sequences = make_sequences(24)
    expected = tokens_alone(llama, sequences)
    decoding, n_refused = start(llama), []

    def check(ids: torch.Tensor, cache: Any) -> None:
        n_slots = len(ids) * (ids.shape[1] + cache.get_seq_length())
        if n_slots > 150 and (ids.shape[1] > 1) == (where == "prompts"):
            n_refused.append(n_slots)
            raise torch.OutOfMemoryError("faked")

    spoil(check)
    outcomes = run(decoding, sequences)

    assert set(outcomes.values()) == {DONE}
    assert [sequence.tokens.output for sequence in sequences] == expected
    assert 0 < len(n_refused) < 24
    assert decoding.budget_tokens < 1 << 20


def test_row_that_never_fits_fails_alone(
    llama: PreTrainedModel, spoil: Callable[[Callable[[torch.Tensor, Any], None]], None]
) -> None:
    """Who does not fit even alone gets `OutOfMemoryError`; the others are answered."""
    sequences = [*make_sequences(6), make_sequence([8] * 200, 5), *make_sequences(6, seed=4)]

    def check(ids: torch.Tensor, cache: Any) -> None:
        if ids.shape[1] + cache.get_seq_length() > 150:
            raise torch.OutOfMemoryError("faked")

    spoil(check)
    outcomes = run(start(llama), sequences)

    assert isinstance(error := outcomes.pop(sequences[6]), OutOfMemoryError)
    assert error.n_tokens == 200
    assert len(outcomes) == 12
    assert set(outcomes.values()) == {DONE}


@pytest.mark.parametrize("when", ["prompt", "step"])
def test_row_that_breaks_the_model_fails_alone(
    llama: PreTrainedModel, spoil: Callable[[Callable[[torch.Tensor, Any], None]], None], when: str
) -> None:
    """Of eight sequences one makes each pass fail that it is in; the other seven get their answers."""
    sequences = make_sequences(8)
    expected = tokens_alone(llama, sequences)
    bad = 3
    sequences[bad].tokens.prompt = [5, 5, 5]  # a token that no other prompt has
    sequences[bad].max_new_tokens = 30

    def check(ids: torch.Tensor, cache: Any) -> None:
        if when == "prompt" and (ids == 5).any():
            raise RuntimeError("faked")
        if (
            when == "step"
            and ids.shape[1] == 1
            and sequences[bad].tokens.output
            and sequences[bad] in decoding._running.decoding
        ):
            raise RuntimeError("faked")

    decoding = start(llama)
    spoil(check)
    outcomes = run(decoding, sequences)

    assert isinstance(outcomes.pop(sequences[bad]), EngineError)
    assert set(outcomes.values()) == {DONE}
    del sequences[bad], expected[bad]
    assert [sequence.tokens.output for sequence in sequences] == expected


def test_text_that_fails_hurts_nobody_else(llama: PreTrainedModel) -> None:
    """What a sequence's own code raises ends that sequence."""
    sequences = make_sequences(4)

    def fail(token: int) -> str | None:
        raise ValueError(token)

    sequences[1].take = fail
    outcomes = run(start(llama), sequences)

    assert isinstance(outcomes.pop(sequences[1]), EngineError)
    assert set(outcomes.values()) == {DONE}


@pytest.fixture
def widths(spoil: Callable[[Callable[[torch.Tensor, Any], None]], None]) -> list[tuple[int, int]]:
    """Return a list that grows by the rows and columns of each forward pass of the model."""
    found: list[tuple[int, int]] = []
    spoil(lambda ids, _: found.append((ids.shape[0], ids.shape[1])))
    return found


def share_prefix(n: int, *, n_same: int = 100, n_new: int = 10) -> list[ScheduledSequence[str]]:
    """Return sequences whose prompts have their first tokens in common, and 1 to n others."""
    dice = random.Random(7)
    same = [dice.randrange(8, 320) for _ in range(n_same)]
    return [make_sequence([*same, *(dice.randrange(8, 320) for _ in range(1 + i))], n_new) for i in range(n)]


def test_equal_prompts_are_computed_once(llama: PreTrainedModel, widths: list[tuple[int, int]]) -> None:
    """Rows with the same prompt share its forward pass and draw by their own seeds."""
    hot = replace(GREEDY, temperature=2.0)
    sequences = [make_sequence([7, 8, 9] * 5, 12, replace(hot, seed=seed)) for seed in range(6)]
    outcomes = run(start(llama), sequences)

    assert set(outcomes.values()) == {DONE}
    assert widths[:2] == [(1, 15), (6, 1)]
    assert len({tuple(sequence.tokens.output) for sequence in sequences}) == 6
    assert [sequence.tokens.output for sequence in sequences] == tokens_alone(llama, sequences)


def test_equal_long_prompts_are_computed_once(
    llama: PreTrainedModel, widths: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are prompts that are prefilled in chunks; who is cancelled meanwhile leaves the others."""
    over: list[int] = []
    sequences = [make_sequence(list(range(8, 308)), 5, is_over=lambda i=i: i in over) for i in range(4)]  # type: ignore[misc]  # i
    decoding = start(llama)
    monkeypatch.setattr(PrefillBudget, "n_tokens", 128)  # measured otherwise
    for sequence in sequences:
        decoding.add(sequence)
    for _ in range(3):
        decoding.step()
    over += [0, 2]

    outcomes = run(decoding, [])

    assert outcomes == {sequences[1]: DONE, sequences[3]: DONE}
    assert widths[:4] == [(1, 128), (1, 128), (1, 44), (2, 1)]
    assert [sequences[1].tokens.output, sequences[3].tokens.output] == tokens_alone(
        llama, [sequences[1], sequences[3]]
    )


def test_a_common_prefix_is_computed_once(llama: PreTrainedModel, widths: list[tuple[int, int]]) -> None:
    """Prompts that come at once wait for the one that computes what they begin with, and copy it."""
    sequences = share_prefix(6)
    outcomes = run(start(llama), sequences)

    assert set(outcomes.values()) == {DONE}
    assert widths[0] == (1, 101)
    assert max(width for _, width in widths[1:]) <= 6
    assert [sequence.tokens.output for sequence in sequences] == tokens_alone(llama, sequences)


def test_a_common_prefix_outlives_its_rows(llama: PreTrainedModel, widths: list[tuple[int, int]]) -> None:
    """What two prompts began with is kept for the third, after both have left; others are not kept."""
    decoding, sequences = start(llama), share_prefix(4)
    n_computed = []
    for sequence in [*make_sequences(5), *sequences]:
        widths.clear()
        assert run(decoding, [sequence]) == {sequence: DONE}
        n_computed.append(widths[0][1] if sequence in sequences else 0)

    assert n_computed[-4:] == [101, 102, 3, 4]
    assert decoding.cache_bytes == 100 * 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, float32
    assert [sequence.tokens.output for sequence in sequences] == tokens_alone(llama, sequences)


def test_prefixes_make_way_for_rows(llama: PreTrainedModel) -> None:
    """What is kept counts as cache, and goes where a sequence needs the memory."""
    _, bytes_per_token = find_batch_mode(llama)
    decoding = start(llama, budget_tokens=1500)
    run(decoding, share_prefix(3))
    n_kept = decoding.cache_bytes // bytes_per_token
    sequences, held = make_sequences(40), []
    for sequence in sequences:
        decoding.add(sequence)
    while not decoding.is_idle:
        decoding.step()
        held.append(decoding.cache_bytes)

    assert n_kept == 100
    assert max(held) <= 1500 * bytes_per_token
    assert decoding.cache_bytes == 0
    assert [sequence.tokens.output for sequence in sequences] == tokens_alone(llama, sequences)


def test_prefixes_go_first_when_memory_runs_out(
    llama: PreTrainedModel, spoil: Callable[[Callable[[torch.Tensor, Any], None]], None]
) -> None:
    """A sequence that fails for lack of memory is tried again when nothing is kept any more."""
    decoding, sequence = start(llama), make_sequence([5] * 30, 5)
    run(decoding, share_prefix(3))

    def check(ids: torch.Tensor, _: Any) -> None:
        if ids.shape[1] > 1 and decoding.cache_bytes:
            raise torch.OutOfMemoryError("faked")

    spoil(check)

    assert run(decoding, [sequence]) == {sequence: DONE}
    assert decoding.cache_bytes == 0


def test_duplicates_that_break_the_model_fail_alone(
    llama: PreTrainedModel, spoil: Callable[[Callable[[torch.Tensor, Any], None]], None]
) -> None:
    """A prompt that no pass survives fails each of its sequences, and none else."""
    duplicates = [make_sequence([5, 5, 5], 4) for _ in range(4)]
    sequences = share_prefix(4)

    def check(ids: torch.Tensor, _: Any) -> None:
        if (ids == 5).any():
            raise RuntimeError("faked")

    spoil(check)
    outcomes = run(start(llama), [*sequences[:2], *duplicates, *sequences[2:]])

    assert all(isinstance(outcomes.pop(duplicate), EngineError) for duplicate in duplicates)
    assert outcomes == dict.fromkeys(sequences, DONE)
