"""Matrix products in bfloat16 within a model that is float32 otherwise.

Sums, norms and the residual stream stay in float32: cosines to a float32 model then stay above 0.9999, where
a model that is bfloat16 throughout falls below. Torch's autocast does the same at several times the cost.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name
from transformers.activations import GELUActivation

from penstock_workers.engines.kernels import LANES, Kernels, find_kernels

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
        states = _rounded(states)
        if self._is_laid_out:
            found: Tensor = torch.ops.mkldnn._linear_pointwise(
                states, self.weight, self.bias, self._activation, [], "none"
            )
            return found
        found = F.linear(states, self.weight, self.bias)
        return F.gelu(found) if self._activation == "gelu" else found


class SumNorm(nn.Module):
    """The BERT family's way from a layer's states to the next one's: a product, the residual, a LayerNorm.

    Args:
        layer: has `dense`, a `Product`, and `LayerNorm`.
        kernels: what computes it.
    """

    def __init__(self, layer: Any, kernels: Kernels) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self._kernels = layer.dense, layer.LayerNorm, kernels

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return float32, shape (..., dim), as large as `input_tensor`."""
        found, rounded = self._kernels.add_norm(self.dense(hidden_states), input_tensor, self.LayerNorm)
        _remember_rounded(found, rounded)
        return found


def _is_sum_norm(module: nn.Module) -> bool:
    norm = getattr(module, "LayerNorm", None)
    return (
        isinstance(getattr(module, "dense", None), nn.Linear)
        and type(norm) is nn.LayerNorm
        and norm.bias is not None
        and norm.normalized_shape[0] % LANES == 0
        and list(inspect.signature(module.forward).parameters) == ["hidden_states", "input_tensor"]
    )


def _rounded(states: Tensor) -> Tensor:
    """Return states in bfloat16; those that several products read are rounded once."""
    if states.dtype == torch.bfloat16:
        return states
    found: Tensor | None = getattr(states, "penstock_rounded", None)
    if found is None:
        found = _remember_rounded(states, states.bfloat16())
    return found


def _remember_rounded(states: Tensor, rounded: Tensor) -> Tensor:
    states.penstock_rounded = rounded  # type: ignore[attr-defined]  # lives as long as the tensor does
    return rounded


def use_bfloat16(model: nn.Module) -> Callable[[], None]:
    """Compute a model's Linear layers in bfloat16; returns what undoes it."""
    replaced: list[tuple[nn.Module, str, Any]] = []

    def replace(parent: nn.Module, name: str, new: nn.Module) -> None:
        replaced.append((parent, name, getattr(parent, name)))
        setattr(parent, name, new)

    kernels = find_kernels(next(model.parameters()).device)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if kernels is not None and _is_sum_norm(child):
                replace(parent, name, SumNorm(child, kernels))
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
