"""Which weights came from a model's files: all that take part in its answers, or it does not load."""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from penstock.errors import ModelLoadError

logger = logging.getLogger(__name__)

_COMPUTED: Final = ("inv_freq", "original_inv_freq", "position_ids")
"""Buffers that only some checkpoints hold: a model computes them itself where they are missing."""


class Weights:
    """The report on what transformers loaded from a model's files.

    Attributes:
        missing: Names of weights that the model has and its files do not.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self._tensors: list[Tensor] = []
        self._unused: list[str] = []

    def note(self, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
        """Add the report of transformers on a model that it loaded."""
        found = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        absent = sorted(key for key in found if key.rpartition(".")[2] not in _COMPUTED)
        self.missing += absent
        self._tensors += [model.get_parameter_or_buffer(key) for key in absent]
        self._unused += [key for key in sorted(report["unexpected_keys"]) if _is_part(model, key)]

    def blank(self) -> None:
        """Make missing weights NaN, so that whatever is computed with them is noticed.

        transformers fills them with random numbers. Some are never used, such as the pooler of many encoders:
        a trial tells which, not their names.
        """
        for tensor in self._tensors:
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(math.nan)

    def check_all(self, name: str) -> None:
        """Refuse a model if one of its weights is missing.

        Raises:
            ModelLoadError: A weight is missing.
        """
        if self.missing:
            verb = "weight is" if len(self.missing) == 1 else "weights are"
            raise ModelLoadError(
                name, f"{len(self.missing)} {verb} missing in its files, the first is {self.missing[0]}"
            )

    def tell_unused(self, name: str) -> None:
        """Log in one line which weights in the files belong to parts of the model and are not used."""
        if self._unused:
            logger.warning(
                "model %s: %d weights in its files are not used, the first is %s",
                name,
                len(self._unused),
                self._unused[0],
            )


@contextmanager
def reading(name: str) -> Iterator[Weights]:
    """Note what transformers loads in the block, whoever calls it.

    Raises:
        ModelLoadError: A weight has another shape in the files.
        Exception: Whatever else libraries raise over foreign files.
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
        if tables.mismatch is None:
            raise
        told = f"its weights are of another shape than its configuration says, as {tables.mismatch}"
        raise ModelLoadError(name, told) from error
    finally:
        transformer.from_pretrained = before
        log.removeFilter(tables)
    weights.tell_unused(name)


def _is_part(model: PreTrainedModel, key: str) -> bool:
    """Tell whether a weight belongs to a part that the model has, such as a layer too many; heads do not."""
    name = key.removeprefix(f"{model.base_model_prefix}.")
    child = getattr(model, name.partition(".")[0], None)
    return isinstance(child, nn.Module) and any(True for _ in child.children())


class _NoTables(logging.Filter):
    """Hides the table of missing weights that transformers logs: they end the load, or do not matter.

    Attributes:
        mismatch: Name of the first weight that has another shape in the files, by the table.
    """

    mismatch: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if "LOAD REPORT" not in text:
            return True
        if found := re.search(r"^(\S.*?) *\|.*MISMATCH", text, re.MULTILINE):
            self.mismatch = found.group(1)
        return False
