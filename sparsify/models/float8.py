"""A frozen model's linear layers in 8-bit floats: half the memory, and on Hopper half the time.

Shapes: N tokens, I input features, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.models.structure import find_blocks, linears_of

_DTYPE = torch.float8_e4m3fn

_MOST = torch.finfo(_DTYPE).max

_LEAST_SCALE = 1e-12  # of a row that is all zeros


class Float8Linear(nn.Module):
    """A linear layer whose weight is float8 (e4m3) with one float32 scale per output.

    On GPUs that multiply float8 the inputs are rounded too, with one scale per token; elsewhere the
    weight is turned back into the dtype of the inputs first, which saves memory only. No gradient.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantized(linear.weight.detach())
        self.register_buffer("weight", weight)  # (O, I) float8
        self.register_buffer("scale", scale)  # (O, 1) float32
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in the dtype of `x`."""
        if not multiplies_float8(x.device):
            weight = (self.weight.float() * self.scale).to(x.dtype)
            return nn.functional.linear(x, weight, self.bias)
        x_q, x_scale = quantized(x.flatten(0, -2))
        out = torch._scaled_mm(
            x_q, self.weight.t(), scale_a=x_scale, scale_b=self.scale.t(), out_dtype=torch.bfloat16
        )
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to float8, each with the scale that puts its largest element at float8's.

    Args:
        values: (R, C), any float dtype.

    Returns:
        float8 (R, C) and float32 (R, 1), whose product is within 2^-4 of each element, relatively,
        for elements above 2^-14 of their row's largest.
    """
    scale = (values.abs().amax(dim=1, keepdim=True).float() / _MOST).clamp(min=_LEAST_SCALE)
    return (values.float() / scale).clamp(-_MOST, _MOST).to(_DTYPE), scale


def multiplies_float8(device: torch.device) -> bool:
    """Whether the device has float8 products (compute capability 8.9 or more)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def to_float8_(model: nn.Module) -> int:
    """Replace the linear layers of the model's decoder blocks, in place; embedding and head stay.

    Returns:
        The number of layers replaced.
    """
    num_layers = 0
    for block in find_blocks(model)[1]:
        for name, linear in linears_of(block).items():
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, Float8Linear(linear))
            num_layers += 1
    return num_layers
