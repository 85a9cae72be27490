"""What embedding on a GPU is measured with: random models of two sizes, and the share of time it works."""

import json
import shutil
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from penstock_workers.bundled import bundled_folder

SIZES: Final[Mapping[str, Mapping[str, int]]] = {
    "MiniLM-sized": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "bge-large-sized": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
"""Of all-MiniLM-L6-v2 and of bge-large-en-v1.5, as their configurations have them."""
MAX_TOKENS: Final = 512
SAMPLE_MS: Final = 100


def build_model(folder: Path, size: Mapping[str, int]) -> Mapping[str, Any]:
    """Write a sentence-transformers model with all-MiniLM-L6-v2's tokenizer; return its configuration."""
    import torch
    from transformers import BertConfig, BertModel

    like = bundled_folder("minilm")
    unused = shutil.ignore_patterns("*.safetensors", "README.md", "data_config.json")
    shutil.copytree(like, folder, ignore=unused, dirs_exist_ok=True)
    config: dict[str, Any] = json.loads((like / "config.json").read_text()) | dict(size)
    torch.manual_seed(0)
    BertModel(BertConfig(**config)).save_pretrained(folder)
    _change(folder / "sentence_bert_config.json", max_seq_length=MAX_TOKENS)
    _change(folder / "1_Pooling/config.json", word_embedding_dimension=size["hidden_size"])
    return config


def _change(file: Path, **values: int) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class Busy:
    """Watches how much of the time any kernel runs on the first GPU, by `nvidia-smi`, while it is entered.

    Attributes:
        share: mean of its samples, 0 to 1; known afterwards.
    """

    share = 0.0

    def __enter__(self) -> Self:
        command = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        self._watch = subprocess.Popen(
            [*command, f"--loop-ms={SAMPLE_MS}"], stdout=subprocess.PIPE, text=True
        )
        assert self._watch.stdout is not None
        self._watch.stdout.readline()  # it has started
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.terminate()
        samples = self._watch.communicate()[0].split()
        self.share = statistics.fmean(map(int, samples)) / 100 if samples else 0.0
