"""Copies of weights in the order in which oneDNN reads them.

On a CPU a product of few rows, as in each step of decoding, takes less time with them. docs/notebook/performance.md has
the gain of whole rollouts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

SMALLEST = 200_000  # entries of a weight: the built-in policy, whose weights are smaller, was no faster
ROWS = 32  # of a product that the order is chosen for


def can_prepack(module: nn.Module) -> bool:
    """Return whether a layer is a plain product with a large fp32 weight on a CPU, which is trained.

    While replies are sampled, the copy takes the place of the weight's gradient. A frozen weight has none.
    """
    weight = getattr(module, "weight", None)
    if type(module) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter:
        return False
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.requires_grad and weight.numel() >= SMALLEST


@contextlib.contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Compute large linear layers of `model` from reordered copies of their weights in this block.

    The weights must not change in it. Nothing happens where torch has no oneDNN, or in passes with gradients.
    """
    available = torch.backends.mkldnn.is_available()
    layers = [layer for layer in model.modules() if available and can_prepack(layer)]
    own = [vars(layer).get("forward") for layer in layers]  # of the object, not of its class
    for layer in layers:
        layer.forward = _forward_of(layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _forward_of(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = layer.weight.detach()
    weight = weight.t().contiguous() if isinstance(layer, Conv1D) else weight
    copy, plain = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS), layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return plain(x)
        return torch.ops.mkldnn._linear_pointwise(x, copy, layer.bias, "none", [], "")

    return forward
