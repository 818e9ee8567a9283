"""Mixtures of experts: which of a model's experts pruning cannot reach.

transformers holds the experts of many families as one parameter of three dimensions (experts,
rows, columns) instead of a list of nn.Linear. Such weights see their tokens through a router inside
one fused operation, so that no layer input can be watched: they stay dense.
"""

from __future__ import annotations

from torch import nn

from sparsify.models.structure import find_blocks


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the expert weights in the decoder blocks that are no nn.Linear and stay dense.

    Args:
        model: a transformers decoder; its weights may be on the meta device.

    Returns:
        Full dotted names of the floating point parameters of three dimensions inside the blocks,
        in the model's order. Kernels of convolutions also have three; they are left out.

    Raises:
        InputError: the model has no decoder blocks.
    """
    list_name, blocks = find_blocks(model)
    return [
        f"{list_name}.{module_name}.{name}" if module_name else f"{list_name}.{name}"
        for module_name, module in blocks.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point()
    ]
