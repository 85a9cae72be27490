"""What a model's files hold: all weights that compute come from them, or the model does not load."""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from penstock.errors import ModelLoadError
from penstock.request import Task
from penstock.settings import ModelSettings
from penstock_workers.engines.source import explain_failure, read_json

logger = logging.getLogger(__name__)

_COMPUTED: Final = ("inv_freq", "original_inv_freq", "position_ids")
"""Buffers that some checkpoints hold, and that a model computes where they do not."""
_LABELS: Final = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
_FOREIGN_HEADS: Final[Mapping[Task, tuple[str, ...]]] = {
    "embed": ("ForSequenceClassification", *_LABELS),
    "rerank": _LABELS,
    "generate": ("ForSequenceClassification", "ForMaskedLM", *_LABELS),
}
_KINDS: Final[Mapping[Task, str]] = {"embed": "SentenceTransformer", "rerank": "CrossEncoder"}
_OWN_ATTENTION: Final = (None, "sdpa", "eager")


class Weights:
    """Which weights came from files, of all that transformers loaded.

    Attributes:
        missing: names of those that did not.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self._tensors: list[Tensor] = []
        self._unused: list[str] = []

    def note(self, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
        """Take what transformers reports of a model that it loaded."""
        found = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        absent = sorted(key for key in found if key.rpartition(".")[2] not in _COMPUTED)
        self.missing += absent
        self._tensors += [model.get_parameter_or_buffer(key) for key in absent]
        self._unused += [key for key in sorted(report["unexpected_keys"]) if _is_part(model, key)]

    def blank(self) -> None:
        """Make what is missing useless: whatever is computed with it is not a number, and so is noticed.

        transformers fills it with random numbers. Some are not used, as the pooler of many encoders: that
        is told by trying, not by names.
        """
        for tensor in self._tensors:
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(math.nan)

    def check_all(self, name: str) -> None:
        """Refuse a model of which any weight is missing.

        Raises:
            ModelLoadError: one is.
        """
        if self.missing:
            verb = "weight is" if len(self.missing) == 1 else "weights are"
            raise ModelLoadError(
                name, f"{len(self.missing)} {verb} missing in its files, the first is {self.missing[0]}"
            )

    def tell_unused(self, name: str) -> None:
        """Say in one line what the files hold of the model's own parts that it does not take."""
        if self._unused:
            logger.warning(
                "model %s: %d weights in its files are not used, the first is %s",
                name,
                len(self._unused),
                self._unused[0],
            )


@contextmanager
def reading(name: str) -> Iterator[Weights]:
    """Note what transformers loads while the block runs, whoever asks it to.

    Raises:
        ModelLoadError: one line for whatever the libraries meet in foreign files.
    """
    weights = Weights()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # has no annotations
    before = PreTrainedModel.__dict__["from_pretrained"]

    def read(cls: Any, /, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        model, report = before.__func__(cls, *args, output_loading_info=True, **options)
        weights.note(model, report)
        return (model, report) if output_loading_info else model

    log, tables = logging.getLogger("transformers.modeling_utils"), _NoTables()
    log.addFilter(tables)
    transformer: Any = PreTrainedModel
    # sentence-transformers has no way to ask for the report
    transformer.from_pretrained = classmethod(read)
    try:
        yield weights
    except ModelLoadError:
        raise
    except Exception as error:
        if tables.mismatch is not None:
            told = f"its weights are of another shape than its configuration says, as {tables.mismatch}"
            raise ModelLoadError(name, told) from error
        raise explain_failure(name, error) from error
    finally:
        transformer.from_pretrained = before
        log.removeFilter(tables)
    weights.tell_unused(name)


def check_files(name: str, source: str, model: ModelSettings) -> dict[str, Any]:
    """Refuse what the files say that they are not for, before anything large is read.

    Args:
        name: of the model.
        source: a folder or a hub id.
        model: its settings.

    Returns:
        Options for transformers: an attention that is there, where the files name another.

    Raises:
        ModelLoadError: they are an adapter, of another task, or their code lies in another repository.
    """
    try:
        config = read_json(source, "config.json", model.revision) or {}
        modules = read_json(source, "modules.json", model.revision)
        kind = read_json(source, "config_sentence_transformers.json", model.revision) or {}
        extra = read_json(source, "sentence_bert_config.json", model.revision) or {}
        adapter = read_json(source, "adapter_config.json", model.revision)
        if model.task == "generate":
            # transformers goes on without one that it cannot read
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
    except ModelLoadError:
        raise
    except Exception as error:
        raise explain_failure(name, error) from error
    if not asked:
        return {}
    logger.warning("model %s: attention %s is not used here, torch's is", name, ", ".join(sorted(asked)))
    return {"attn_implementation": None}  # the best that torch brings and the model knows


def _check_task(
    name: str, task: Task, config: Mapping[str, Any], modules: object, kind: Mapping[str, Any]
) -> None:
    own = kind.get("model_type")
    if own is not None and task in _KINDS and own != _KINDS[task]:
        raise ModelLoadError(name, f"its files are a {own}'s, and task = {task!r} takes a {_KINDS[task]}")
    if modules is not None and task == "embed":
        return  # they say how its vectors come about, whatever its transformer was trained on before
    architectures = config.get("architectures") or []
    if isinstance(architectures, list) and architectures:
        foreign = [str(one) for one in architectures if str(one).endswith(_FOREIGN_HEADS[task])]
        if len(foreign) == len(architectures):
            raise ModelLoadError(name, f"its files are a {foreign[0]}'s, which is not for task = {task!r}")


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for value in config.values() if isinstance(value, dict)]


def _check_code(name: str, source: str, revision: str | None) -> None:
    """Refuse references to code in another repository: it would be taken as it is there at the moment."""
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


def _is_part(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight's name is within what the model has, as a layer too many; heads are not."""
    name = key.removeprefix(f"{model.base_model_prefix}.")
    child = getattr(model, name.partition(".")[0], None)
    return isinstance(child, nn.Module) and any(True for _ in child.children())


class _NoTables(logging.Filter):
    """Keeps transformers from printing a table of what is missing: the load ends, or it has no effect.

    Attributes:
        mismatch: name of the first weight that the table says is of another shape.
    """

    mismatch: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if "LOAD REPORT" not in text:
            return True
        if found := re.search(r"^(\S.*?) *\|.*MISMATCH", text, re.MULTILINE):
            self.mismatch = found.group(1)
        return False
