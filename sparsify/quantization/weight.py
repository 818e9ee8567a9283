"""One weight to codes of any scheme: by GPTQ with refinement, or each weight to its nearest.

Shape suffixes: O output features (rows), I input features (columns), G groups of columns, R some of
the rows. Of a stack of weights all tensors have a leading dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.calibration.layers import Layer
from sparsify.calibration.stacks import as_stack
from sparsify.errors import InputError, NonFiniteError
from sparsify.packed.layer import Codes
from sparsify.params import QuantParams
from sparsify.quantization.codes import Quantized, dequantize, per_column
from sparsify.quantization.gptq import Inputs, gptq
from sparsify.quantization.levels import Levels
from sparsify.quantization.scales import groups, search_scales
from sparsify.quantization.schemes import Grid, get_scheme


def quantize_weight(
    weight_OI: Tensor,
    keep_mask_OI: Tensor,
    hessian_II: Tensor | None,
    params: QuantParams,
    name: str,
    cross_II: Tensor | None = None,
) -> Quantized:
    """Quantise one layer, or any of its rows: rows do not depend on each other.

    Args:
        weight_OI: floating point (O, I); what it holds at pruned places is ignored.
        keep_mask_OI: bool (O, I), True = survives.
        hessian_II: mean of x x^T (I, I); gptq needs it, rtn ignores it.
        params: scheme, method and numbers.
        name: layer, for messages.
        cross_II: mean of y x^T, y being the layer's input in the unquantised model; None: y = x.

    Returns:
        `Quantized`; computed in float32 (float64 if given).

    Raises:
        NonFiniteError: the weight or the Hessian holds NaN or infinity.
        InputError: a weight is too large for the scheme's scales, or see `QuantScheme.check`.
        SingularHessianError: see `hessian.inverse_factor`.

    Cost: gptq 2/3 I^3 for the factor, O I^2 for the elimination and for each sweep, O I
    num_scale_steps for the scales; float32 copies of the weight, four (I, I) matrices.
    """
    inputs = None
    if params.method == "gptq":
        assert hessian_II is not None, "gptq needs the Hessian"
        size = get_scheme(params.scheme).group_size_of(params, len(hessian_II))
        inputs = Inputs.of(hessian_II, cross_II, size, params.damping, name)
    return quantize_rows(weight_OI, keep_mask_OI, inputs, params, [name])


class KnownInputs:
    """What gptq knows of layers' inputs, computed once for those that share them.

    A stack comes as a whole or in parts, and so does the next one with the same inputs: what is
    known of all parts is kept until the inputs are others.

    Args:
        params: scheme, method and numbers.
        has_teacher: whether outputs of the unquantised model are aimed at.
    """

    def __init__(self, params: QuantParams, has_teacher: bool) -> None:
        self._params = params
        self._has_teacher = has_teacher
        self._known: dict[tuple[int, ...], tuple[list[Tensor], Inputs]] = {}
        """ids of Hessians -> these, without which an id may be another's, and what is known"""

    def begin(self, layers: Sequence[Layer]) -> None:
        """Forget all but the inputs of a layer or stack, before the next take their memory."""
        ids = {id(layer.moments.hessian_II) for layer in layers}
        self._known = {key: found for key, found in self._known.items() if ids.issuperset(key)}

    def of(self, layers: Sequence[Layer]) -> Inputs | None:
        """Those of a layer, a stack or its part, by the identity of their Hessians; None of rtn.

        Raises:
            NonFiniteError, SingularHessianError: see `hessian.inverse_factor`.
        """
        if self._params.method != "gptq":
            return None
        hessians = [layer.moments.hessian_II for layer in layers]
        key = tuple(map(id, hessians))
        if key not in self._known:
            crosses = [layer.moments.cross_II for layer in layers if self._has_teacher]
            cross_II = None
            if any(found is not None for found in crosses):
                # Inputs without pairs count as they are.
                pairs = zip(crosses, hessians, strict=True)
                cross_II = as_stack([own if found is None else found for found, own in pairs])
            size = get_scheme(self._params.scheme).group_size_of(self._params, len(hessians[0]))
            found = Inputs.of(
                as_stack(hessians), cross_II, size, self._params.damping,
                *(layer.name for layer in layers),
            )  # fmt: skip
            self._known[key] = hessians, found
        return self._known[key][1]

    def forget(self) -> None:
        """Give their memory back."""
        self._known = {}


def quantize_rows(
    weight_RI: Tensor, keep_RI: Tensor, inputs: Inputs | None, params: QuantParams,
    names: Sequence[str],
) -> Quantized:  # fmt: skip
    """`quantize_weight` of rows whose inputs are known; None of rtn, which ignores them.

    Args:
        weight_RI, keep_RI, params: see there; or of a stack.
        inputs: of the layer, or of each of the stack.
        names: of the layers, for messages.

    Raises:
        NonFiniteError, InputError: see `quantize_weight`.
    """
    scheme = get_scheme(params.scheme)
    grid, num_columns = scheme.grid(params), weight_RI.shape[-1]
    group_size = scheme.group_size_of(params, num_columns)
    working_dtype = torch.promote_types(weight_RI.dtype, torch.float32)
    target_RI = weight_RI.detach().to(working_dtype).masked_fill(~keep_RI, 0.0)
    _check_range(names, target_RI, grid)
    if inputs is None:
        levels = _round_to_nearest(target_RI, keep_RI, grid, group_size, params)
    else:
        levels = gptq(target_RI, keep_RI, inputs, grid, group_size, params)
    zeros_RG = levels.zeros_OG
    zeros_RI = None if zeros_RG is None else per_column(zeros_RG, group_size, num_columns)
    codes = Codes(
        grid.stored(levels.levels_OI, zeros_RI), levels.scales_OG.to(grid.scale_dtype),
        scheme.stored_as(params, num_columns),
        None if zeros_RG is None else zeros_RG.to(torch.uint8),
    )  # fmt: skip
    return Quantized(codes, dequantize(codes, weight_RI.dtype))


def _check_range(names: Sequence[str], target_OI: Tensor, grid: Grid) -> None:
    if not target_OI.numel():
        return
    largest_scale = torch.finfo(grid.scale_dtype).max
    # One wait for all of a stack; the largest of numbers of which one is NaN is NaN.
    largest = target_OI.abs().reshape(len(names), -1).amax(1).tolist()
    for name, highest in zip(names, largest, strict=True):
        if not math.isfinite(highest):
            raise NonFiniteError(f"{name}: the weight holds NaN or infinity; check the checkpoint")
        if highest / grid.highest > largest_scale:
            raise InputError(
                f"{name}: weights up to {highest:.3g} need scales beyond float16 (at most "
                f"{largest_scale:.0f} * {grid.highest:g}); check the checkpoint"
            )


def _round_to_nearest(
    weight_OI: Tensor, keep_OI: Tensor, grid: Grid, group_size: int, params: QuantParams
) -> Levels:
    """Levels and scales, group by group, by square error of the weights alone."""
    scales, zeros = [], []
    levels_OI = torch.empty_like(weight_OI)
    for start, stop in groups(weight_OI.shape[-1], group_size):
        part = slice(start, stop)
        weight_OB, keep_OB = weight_OI[..., part], keep_OI[..., part]
        ones_B = weight_OI.new_ones(stop - start).expand(*weight_OI.shape[:-2], -1)
        scales_O, zeros_O = search_scales(weight_OB, keep_OB, ones_B, grid, params.num_scale_steps)
        zeros_O1 = None if zeros_O is None else zeros_O.unsqueeze(-1)
        levels_OI[..., part] = grid.nearest(weight_OB, scales_O.unsqueeze(-1), zeros_O1)
        scales.append(scales_O)
        zeros.append(zeros_O)
    levels_OI.masked_fill_(~keep_OI, 0.0)
    return Levels.of(levels_OI, scales, zeros)
