"""Matrix products in bfloat16 by torch, within a model that is float32 otherwise.

Sums, norms and the residual stream stay in float32: cosines to a float32 model then stay above 0.9999, where
a model that is bfloat16 throughout falls below. Torch's autocast does the same at several times the cost.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name
from transformers.activations import GELUActivation

from penstock_workers.embedding.tokenizing import Encoded
from penstock_workers.embedding.way import Way

TYPICAL_ROWS: Final = 1024
"""Number of tokens that oneDNN lays weights out for; other numbers work too."""


class Product(nn.Module):
    """A Linear layer's product in bfloat16; on a CPU oneDNN lays its weights out once.

    Args:
        linear: The layer; it is left as it is.
        activation: `gelu` to compute GELU on the product's float32 sums, or `none`.
    """

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        weight = linear.weight.detach().bfloat16()
        self._activation = activation
        self._is_laid_out = (
            weight.device.type == "cpu"
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's own gap
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        if self._is_laid_out:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        self.weight = weight
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, states: Tensor) -> Tensor:
        """Return bfloat16, shape (..., n_out); torch makes float32 of its sum with float32."""
        states = states.bfloat16()
        if self._is_laid_out:
            found: Tensor = torch.ops.mkldnn._linear_pointwise(
                states, self.weight, self.bias, self._activation, [], "none"
            )
            return found
        found = F.linear(states, self.weight, self.bias)
        return F.gelu(found) if self._activation == "gelu" else found


class Bfloat16:
    """A way whose matrix products are in bfloat16. See `Way`.

    Args:
        base: The way in float32.
        model: The model that both compute; its Linear layers are replaced.
    """

    dtype: Final = "bfloat16"

    def __init__(self, base: Way, model: nn.Module) -> None:
        self._base = base
        self.name, self.is_padded, self.device = base.name, base.is_padded, base.device
        self._undo: Callable[[], None] | None = use_bfloat16(model)

    def embed(self, texts: Sequence[Encoded], features: Mapping[str, Any]) -> Tensor:
        """See `Way.embed`."""
        return self._base.embed(texts, features)

    def close(self) -> None:
        """Give the model its own Linear layers back; the way in float32 stays in use."""
        if self._undo is not None:
            self._undo()
        self._undo = None

    def settle(self) -> None:
        """Free the model's own Linear layers."""
        self._undo = None


def use_bfloat16(model: nn.Module) -> Callable[[], None]:
    """Compute a model's Linear layers in bfloat16; returns what undoes it."""
    replaced: list[tuple[nn.Module, str, Any]] = []

    def replace(parent: nn.Module, name: str, new: nn.Module) -> None:
        replaced.append((parent, name, getattr(parent, name)))
        setattr(parent, name, new)

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                # The BERT family's way to say Linear, then GELU.
                fuses = name == "dense" and isinstance(
                    getattr(parent, "intermediate_act_fn", None), GELUActivation
                )
                replace(parent, name, Product(child, "gelu" if fuses else "none"))
                if fuses:
                    replace(parent, "intermediate_act_fn", nn.Identity())

    def undo() -> None:
        for parent, name, old in reversed(replaced):
            setattr(parent, name, old)

    return undo
