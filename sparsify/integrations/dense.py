"""The linear layers that a packed model keeps dense, its head above all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.integrations.linear import PackedLinear
from sparsify.kernels.cpu.dense import dense_linear, takes


class DenseLinear(nn.Linear):
    """An nn.Linear that multiplies few tokens on a CPU by `kernels.cpu.dense`, and else as torch.

    Not where a gradient is wanted, nor where `PackedLinear.uses_kernels` is False. Derivatives
    forward (`torch.func.jvp`) it has none, as packed layers have none.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of `x`."""
        bias = self.bias
        has_gradient = torch.is_grad_enabled() and (
            x.requires_grad
            or self.weight.requires_grad
            or (bias is not None and bias.requires_grad)
        )
        # A hook may have kept this method from before `leave_dense`.
        is_wanted = isinstance(self, DenseLinear) and PackedLinear.uses_kernels
        if is_wanted and not has_gradient and takes(x, self.weight):
            output: Tensor = dense_linear(x, self.weight, bias)
            return output
        return nn.functional.linear(x, self.weight, bias)


def speed_up_dense(model: nn.Module) -> None:
    """Make every plain nn.Linear of a model that the kernel may take, bfloat16 on the CPU, a
    `DenseLinear`, in place: hooks, ties and whoever holds the module keep it."""
    for module in model.modules():
        if type(module) is nn.Linear:
            weight = module.weight
            if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
                module.__class__ = DenseLinear


def leave_dense(model: nn.Module) -> None:
    """Undo `speed_up_dense`, as for tools that look for nn.Linear by its exact type."""
    for module in model.modules():
        if type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
