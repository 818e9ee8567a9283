"""The fastest way for many tokens, for every packed layer of a model on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.integrations.linear import PackedLinear
from sparsify.kernels.cuda.choice import Choices, Measure, measure_ways, use
from sparsify.kernels.cuda.layout import Prepared
from sparsify.kernels.cuda.linear import DTYPES
from sparsify.kernels.cuda.ways import WAYS, Problem


def choose_ways(
    model: nn.Module, choices: Choices, seconds: Measure, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Measure what has not been measured on this card, and let the model's layers go that way.

    Args:
        model: with packed layers on a GPU; others are left alone.
        choices: of this card, perhaps from an earlier time.
        seconds: measures a call.
        dtype: of inputs, bfloat16 or float16.

    Cost: for each new shape and type of values, the time of all ways at 8 numbers of tokens, and
    memory of one dense copy; of what is chosen, memory of a copy a layer if `choices.may_copy`.
    """
    for layer in model.modules():
        if not isinstance(layer, PackedLinear) or not layer.weight.is_cuda:
            continue
        if not layer.arrange("cuda", dtype):
            continue
        assert layer.kind is not None
        prepared = Prepared(
            layer.weight, layer.weight_indices, layer.weight_scales, layer.weight_zeros
        )
        problem = Problem(
            layer.kind, layer.out_features, layer.in_features,
            layer.layer.scheme.group_size or 0, prepared.zeros is not None, DTYPES[dtype],
        )  # fmt: skip

        def inputs(num_tokens: int, columns: int = layer.in_features) -> Tensor:
            return torch.randn(num_tokens, columns, dtype=dtype, device=prepared.values.device)  # noqa: B023

        choice = choices.get(problem, lambda: measure_ways(problem, prepared, seconds, inputs))  # noqa: B023
        layer.copy = choice.copy or ""
        make = WAYS[layer.copy].copy if layer.copy else None
        layer.copies = [] if make is None else make(problem, prepared)
    use(choices)
