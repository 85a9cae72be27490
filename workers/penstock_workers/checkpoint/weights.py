"""What a model's files hold: all weights that compute come from them, or the model does not load."""

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
from penstock_workers.checkpoint.failures import explain_failure

logger = logging.getLogger(__name__)

_COMPUTED: Final = ("inv_freq", "original_inv_freq", "position_ids")
"""Buffers that some checkpoints hold, and that a model computes where they do not."""


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
