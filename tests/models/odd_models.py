"""Small random models that other software failed on, as folders."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    BoW,
    Dense,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LINES = (
    "The water falls through the penstock and turns the wheel.",
    "When the gate is closed, the water waits above it.",
    "Größe und Gefälle bestimmen die Leistung.",
)
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
WORDS = ("water", "wheel", "gate", "falls", "turbine", "pipe")

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "camembert": ("camembert", {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "mpnet": ("mpnet", {"max_position_embeddings": 66}),
    "distilbert": ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "albert": ("albert", {"embedding_size": 16}),
    "electra": ("electra", {"embedding_size": 32}),
    "deberta-v2": ("deberta-v2", {"pos_att_type": ["c2p", "p2c"], "relative_attention": True}),
    "modernbert": ("modernbert", {"local_attention": 16, "cls_token_id": 0, "sep_token_id": 2}),
    "t5": ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 64}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "longformer": ("longformer", {"attention_window": [8, 8], "max_position_embeddings": 66}),
}


def make_tokenizer(*, has_padding: bool = True, **fields: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with RoBERTa's special tokens, trained on a few lines."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    named = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    if has_padding:
        named["pad"] = "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, **{f"{name}_token": token for name, token in named.items()}, **fields
    )


def make_encoder(folder: Path, kind: str = "bert", *, has_padding: bool = True, **fields: Any) -> Path:
    """A transformer's folder as transformers saves it: no word about pooling."""
    torch.manual_seed(1)
    model_type, own = ENCODERS[kind]
    AutoModel.from_config(CONFIG_MAPPING[model_type](**SIZES | own | fields)).save_pretrained(folder)
    make_tokenizer(has_padding=has_padding).save_pretrained(folder)
    return folder


def make_classifier(folder: Path, kind: str = "bert", **fields: Any) -> Path:
    """A cross-encoder's folder."""
    torch.manual_seed(1)
    model_type, own = ENCODERS[kind]
    config = CONFIG_MAPPING[model_type](**SIZES | own | {"num_labels": 1} | fields)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_dense(folder: Path) -> Path:
    """A transformer, its mean, and a layer on top."""
    make_encoder(folder / "bare")
    torch.manual_seed(2)
    modules = [Transformer(str(folder / "bare")), Pooling(32), Dense(32, 16), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


def make_static(folder: Path) -> Path:
    """A table of tokens' vectors: no transformer, no attention mask."""
    torch.manual_seed(1)
    module = StaticEmbedding(make_tokenizer().backend_tokenizer, embedding_weights=torch.randn(320, 64))
    SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(folder))
    return folder


def make_words(folder: Path) -> Path:
    """A table of words' vectors, and their mean."""
    torch.manual_seed(1)
    tokenizer = WhitespaceTokenizer(["PADDING_TOKEN", *WORDS], stop_words=(), do_lower_case=True)
    words = WordEmbeddings(tokenizer, torch.randn(1 + len(WORDS), 8))
    SentenceTransformer(modules=[words, Pooling(8)], device="cpu").save_pretrained(str(folder))
    return folder


def make_counts(folder: Path) -> Path:
    """How often each word is in a text, times its weight."""
    module = BoW(list(WORDS), {"water": 0.5})
    SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(folder))
    return folder


def change_json(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None takes one out."""
    found = json.loads(file.read_text()) if file.exists() else {}
    kept = {key: value for key, value in (found | fields).items() if value is not None}
    file.write_text(json.dumps(kept))


def drop_weights(folder: Path, is_gone: Callable[[str], bool]) -> Sequence[str]:
    """Take weights out of a folder's first file; returns their names."""
    file = next(folder.rglob("model.safetensors"))
    tensors = load_file(file)
    gone = [key for key in tensors if is_gone(key)]
    save_file({key: tensors[key] for key in tensors if key not in gone}, file, metadata={"format": "pt"})
    return gone
