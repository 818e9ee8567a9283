"""The linear layers that a packed model keeps dense, its head above all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.integrations.linear import PackedLinear
from sparsify.kernels.cpu.dense import dense_linear, takes


class DenseLinear(nn.Linear):
    """An nn.Linear that multiplies few tokens on a CPU by `kernels.cpu.dense`, and else as torch.

    Not where a gradient is wanted, nor where `PackedLinear.uses_kernels` is False.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of `x`."""
        has_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if PackedLinear.uses_kernels and not has_gradient and takes(x, self.weight):
            output: Tensor = dense_linear(x, self.weight, self.bias)
            return output
        return super().forward(x)


def speed_up_dense(model: nn.Module) -> None:
    """Make every plain nn.Linear of a model a `DenseLinear`, in place; weights stay."""
    _swap(model, nn.Linear, DenseLinear)


def leave_dense(model: nn.Module) -> None:
    """Undo `speed_up_dense`."""
    _swap(model, DenseLinear, nn.Linear)


def _swap(model: nn.Module, before: type[nn.Linear], after: type[nn.Linear]) -> None:
    for module in model.modules():
        if type(module) is before:
            module.__class__ = after  # hooks, ties and whoever holds the module keep it
