"""Matrix products in bfloat16 within a model that is float32 otherwise.

Sums, norms and the residual stream stay in float32: cosines to a float32 model then stay above 0.9999, where
a model that is bfloat16 throughout falls below. Torch's autocast does the same at several times the cost.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name
from transformers.activations import GELUActivation

TYPICAL_ROWS = 1024
"""How many tokens oneDNN lays weights out for; other numbers work too."""


class Product(nn.Module):
    """A Linear layer's product in bfloat16, on a processor with weights that oneDNN laid out once.

    Args:
        linear: the layer, left as it is.
        activation: `gelu` to have it computed on the product's float32 sums, or `none`.
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
