"""Ask a saved tiny-chat held-out questions and count the answers that are right to the letter.

Usage: python -m tools.tiny_chat.exam [--folder DIR] [--dtype NAME] [--per-family N]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from penstock_workers.bundled import bundled_folder
from tools.tiny_chat.text import FAMILIES, Conversation, Message, conversations

# Training draws from other seeds; the split keeps the prompts apart in any case.
_EXAM_SEED = 90_000
_MAX_NEW_TOKENS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How many prompts of one family got the right answer."""

    family: str
    n_right: int
    n_asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Scores of an exam, and what was answered wrongly.

    Attributes:
        scores: one for each family.
        mistakes: every conversation that went wrong, with the answer given.
    """

    scores: tuple[Score, ...]
    mistakes: tuple[tuple[Conversation, str], ...]

    @property
    def share_right(self) -> float:
        """Share of all prompts answered right, 0 to 1."""
        return sum(s.n_right for s in self.scores) / sum(s.n_asked for s in self.scores)

    def as_markdown(self) -> str:
        """Write the scores as a table with one row per family."""
        rows = [
            f"| {s.family} | {s.n_right} / {s.n_asked} | {s.n_right / s.n_asked:.1%} |" for s in self.scores
        ]
        total = f"| all | | {self.share_right:.1%} |"
        return "\n".join(["| family | right | exact |", "| --- | --- | --- |", *rows, total])


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=bundled_folder("tiny-chat"))
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--per-family", default=200, show_default=True)
@click.option("--mistakes", is_flag=True, help="Show what went wrong as well.")
def main(folder: Path, dtype: str, per_family: int, mistakes: bool) -> None:
    """Ask a saved tiny-chat held-out questions and show its scores."""
    result = examine(folder, dtype=getattr(torch, dtype), per_family=per_family)
    click.echo(result.as_markdown())
    for asked, given in result.mistakes if mistakes else ():
        click.echo(f"{asked.family}: {asked.messages[-1].content!r} -> {given!r}, not {asked.answer!r}")


def examine(
    folder: Path, *, dtype: torch.dtype = torch.float32, per_family: int = 200, batch: int = 64
) -> Result:
    """Ask the model in `folder` for greedy answers to `per_family` held-out prompts of each family."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    asked = sorted(held_out(per_family), key=lambda c: sum(len(m.content) for m in c.messages))
    answers: list[str] = []
    for start in range(0, len(asked), batch):
        answers += answer(model, tokenizer, [c.messages for c in asked[start : start + batch]])
    marked = list(zip(asked, answers, strict=True))
    right = [c.family for c, given in marked if given == c.answer]
    scores = [Score(family=f, n_right=right.count(f), n_asked=per_family) for f in FAMILIES]
    return Result(scores=tuple(scores), mistakes=tuple((c, a) for c, a in marked if a != c.answer))


def held_out(per_family: int) -> list[Conversation]:
    """Draw `per_family` different held-out conversations of each family."""
    found: dict[str, dict[tuple[Message, ...], Conversation]] = {family: {} for family in FAMILIES}
    for conversation in conversations(_EXAM_SEED, "held-out"):
        if len(found[conversation.family]) < per_family:
            found[conversation.family][conversation.messages] = conversation
        elif all(len(drawn) == per_family for drawn in found.values()):
            break
    return [conversation for drawn in found.values() for conversation in drawn.values()]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[Message, ...]]
) -> list[str]:
    """Answer all `prompts` in one batch, greedily."""
    texts = [render(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]  # mypy takes it for a Tensor
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=_MAX_NEW_TOKENS,
        )
    n_prompt_tokens = inputs["input_ids"].shape[1]
    return tokenizer.batch_decode(output[:, n_prompt_tokens:], skip_special_tokens=True)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: str | None = None) -> str:
    """Put messages through the chat template; up to the answer's start, or with `answer` to its end."""
    written = [{"role": message.role, "content": message.content} for message in messages]
    if answer is not None:
        written.append({"role": "assistant", "content": answer})
    rendered = tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=answer is None)
    return str(rendered)


if __name__ == "__main__":
    main()
