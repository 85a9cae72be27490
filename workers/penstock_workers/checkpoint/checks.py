"""What the files of a model say that they are for, checked before anything large is read."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Final

from penstock.errors import ModelLoadError
from penstock.request import Task
from penstock_workers.checkpoint.source import read_json
from penstock_workers.settings import ModelSettings

logger = logging.getLogger(__name__)

_LABELS: Final = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
FOREIGN_HEADS: Final[Mapping[Task, tuple[str, ...]]] = {
    "embed": ("ForSequenceClassification", *_LABELS),
    "rerank": _LABELS,
    "generate": ("ForSequenceClassification", "ForMaskedLM", *_LABELS),
}
"""What the names of architectures end in that are not for a task, by task."""
_KINDS: Final[Mapping[Task, str]] = {"embed": "SentenceTransformer", "rerank": "CrossEncoder"}
_OWN_ATTENTION: Final = (None, "sdpa", "eager")


def check_files(name: str, source: str, model: ModelSettings) -> dict[str, Any]:
    """Refuse files that are for something else, before anything large is read.

    Args:
        name: Name of the model.
        source: A folder or a hub id.
        model: Settings of the model.

    Returns:
        Options for transformers: an attention that is installed, where the files name another.

    Raises:
        ModelLoadError: The files are an adapter, are for another task, or name code in another repository.
        Exception: A file cannot be read, or holds something else than such files do.
    """
    config = read_json(source, "config.json", model.revision) or {}
    modules = read_json(source, "modules.json", model.revision)
    kind = read_json(source, "config_sentence_transformers.json", model.revision) or {}
    extra = read_json(source, "sentence_bert_config.json", model.revision) or {}
    adapter = read_json(source, "adapter_config.json", model.revision)
    if model.task == "generate":
        # transformers would ignore one that it cannot read
        read_json(source, "generation_config.json", model.revision)
    if model.trust_remote_code:
        _check_code(name, source, model.revision)
    if adapter is not None and find_spec("peft") is None:
        raise ModelLoadError(name, "it is an adapter: merge it into its model (merge_and_unload of peft)")
    _check_task(name, model.task, config, modules, kind)
    asked = {
        str(part.get(key))
        for file in (config, extra)
        for part in (file, *_parts(file))
        for key in ("attn_implementation", "_attn_implementation")
        if part.get(key) not in _OWN_ATTENTION
    }
    if not asked:
        return {}
    logger.warning("model %s: attention %s is not used here, torch's is", name, ", ".join(sorted(asked)))
    return {"attn_implementation": None}  # the best that torch has and the model knows


def _check_task(
    name: str, task: Task, config: Mapping[str, Any], modules: object, kind: Mapping[str, Any]
) -> None:
    own = kind.get("model_type")
    if own is not None and task in _KINDS and own != _KINDS[task]:
        raise ModelLoadError(name, f"its files are a {own}'s, and task = {task!r} takes a {_KINDS[task]}")
    if modules is not None and task == "embed":
        return  # its modules say how vectors are computed, whatever the transformer was trained on before
    architectures = config.get("architectures") or []
    if isinstance(architectures, list) and architectures:
        foreign = [str(one) for one in architectures if str(one).endswith(FOREIGN_HEADS[task])]
        if len(foreign) == len(architectures):
            raise ModelLoadError(name, f"its files are a {foreign[0]}'s, which is not for task = {task!r}")


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for value in config.values() if isinstance(value, dict)]


def _check_code(name: str, source: str, revision: str | None) -> None:
    """Refuse references to code in another repository: no revision pins that code."""
    modules: Any = read_json(source, "modules.json", revision) or []
    folders = ["", *(f"{module['path']}/" for module in modules if module.get("path"))]
    files = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    found = [
        *(str(module.get("type")) for module in modules),
        *(
            reference
            for folder in folders
            for file in files
            for reference in _references((read_json(source, folder + file, revision) or {}).get("auto_map"))
        ),
    ]
    if foreign := sorted(one.partition("--")[0] for one in found if "--" in one):
        raise ModelLoadError(
            name,
            f"its code lies in another repository, {foreign[0]}, which no revision pins: "
            "copy the model and that code into a folder",
        )


def _references(auto_map: object) -> list[str]:
    if isinstance(auto_map, dict):
        return [one for value in auto_map.values() for one in _references(value)]
    if isinstance(auto_map, list | tuple):
        return [one for value in auto_map for one in _references(value)]
    return [] if auto_map is None else [str(auto_map)]
