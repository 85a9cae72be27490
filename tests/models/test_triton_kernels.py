"""An encoder by kernels for a GPU: its own modules' hidden states; without a GPU by Triton's interpreter.

That does not know bfloat16 products, so these are of float16; bfloat16 on a GPU is in `test_packed.py`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from penstock_workers.embedding.bert_gpu import BertGpu
from penstock_workers.embedding.row import TILE, RowLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [1, 5, TILE - 1, TILE, TILE + 1, 2 * TILE + 2]
SMALL = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 128}
N_WORDS = 100


@pytest.fixture
def kernels() -> ModuleType:
    """The kernels, compiled or interpreted (`tests/conftest.py`)."""
    pytest.importorskip("triton")
    return import_module("penstock_workers.embedding.triton_kernels")


@pytest.fixture
def bert() -> BertModel:
    """A small one."""
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL, vocab_size=N_WORDS)).eval().to(DEVICE)


def row_of(lengths: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """Texts of random tokens, end to end, and their positions."""
    torch.manual_seed(1)
    words = torch.randint(5, N_WORDS, (sum(lengths),))
    types = torch.randint(0, 2, (sum(lengths),))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": words.to(DEVICE), "token_type_ids": types.to(DEVICE)}, positions


@torch.inference_mode()
def test_hidden_states_are_those_of_its_modules(kernels: ModuleType, bert: BertModel) -> None:
    """Each text has what it has alone, shorter and longer than what a GPU computes at once."""
    row, positions = row_of(LENGTHS)

    found = BertGpu(bert, N_WORDS, torch.float16).hidden(row, positions, RowLayout(LENGTHS, DEVICE))

    parts = [value.split(LENGTHS) for value in row.values()]
    alone = [
        bert(input_ids=words[None], token_type_ids=types[None])[0][0]
        for words, types in zip(*parts, strict=True)
    ]
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.cat(alone), atol=2e-3)


@torch.inference_mode()
def test_positions_and_types_are_the_models_own(kernels: ModuleType) -> None:
    """RoBERTa counts from past its padding, and knows one type, which its tokenizer does not tell."""
    torch.manual_seed(0)
    roberta = RobertaModel(RobertaConfig(**SMALL, vocab_size=N_WORDS, pad_token_id=1)).eval().to(DEVICE)
    row, positions = row_of([9, 30])
    del row["token_type_ids"]

    found = BertGpu(roberta, N_WORDS, torch.float16).hidden(row, positions + 2, RowLayout([9, 30], DEVICE))

    alone = [roberta(input_ids=words[None])[0][0] for words in row["input_ids"].split([9, 30])]
    assert torch.allclose(found, torch.cat(alone), atol=2e-3)


@torch.inference_mode()
def test_sharp_and_large_scores_stay_exact(kernels: ModuleType) -> None:
    """A softmax over several tiles takes its maximum away first: scores of hundreds change nothing."""
    torch.manual_seed(0)
    n_heads, size = 3, 32
    heads = (8 * torch.randn(sum(LENGTHS), 3, n_heads, size)).half().to(DEVICE)

    found = kernels.attend(heads, RowLayout(LENGTHS, DEVICE).tiles, size**-0.5)

    wanted = [
        F.scaled_dot_product_attention(*part.float().permute(1, 2, 0, 3)).transpose(0, 1).flatten(1)
        for part in heads.split(LENGTHS)
    ]
    assert torch.allclose(found.float(), torch.cat(wanted), rtol=2e-3, atol=2e-2)


@torch.inference_mode()
def test_a_text_beyond_the_positions_is_an_error(kernels: ModuleType, bert: BertModel) -> None:
    """On a GPU nothing else would look, and read what lies behind the table."""
    row, positions = row_of([3])

    with pytest.raises(IndexError, match="longer than the model has positions"):
        BertGpu(bert, N_WORDS).hidden(row, positions + 510, RowLayout([3], DEVICE))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda bert: setattr(bert.config, "num_attention_heads", 4), "heads have an unusual size"),
        (lambda bert: setattr(bert.encoder.layer[1].intermediate, "intermediate_act_fn", nn.ReLU()), "GELU"),
        (lambda bert: bert.half(), "not plain float32"),
        (lambda bert: bert.encoder.layer.__delitem__(slice(None)), "no layers"),
    ],
)
def test_others_keep_their_modules(kernels: ModuleType, bert: BertModel, change: Any, reason: str) -> None:
    """What the kernels would compute otherwise is refused."""
    change(bert)

    with pytest.raises(NotImplementedError, match=reason):
        BertGpu(bert, N_WORDS)


def test_words_beyond_the_table_are_refused(kernels: ModuleType, bert: BertModel) -> None:
    """A tokenizer that knows more words than the model is left to torch, which looks."""
    with pytest.raises(NotImplementedError, match="its tokenizer knows words"):
        BertGpu(bert, N_WORDS + 1)


def test_without_triton_modules_compute(bert: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and old installations have none."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "penstock_workers.embedding.triton_kernels", raising=False)
    monkeypatch.delattr("penstock_workers.embedding.triton_kernels", raising=False)

    with pytest.raises(NotImplementedError, match="triton is not installed"):
        BertGpu(bert, N_WORDS)
