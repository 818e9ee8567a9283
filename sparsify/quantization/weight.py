"""One weight to codes of any scheme: by GPTQ with refinement, or each weight to its nearest.

Shape suffixes: O output features (rows), I input features (columns), G groups of columns, R some of
the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
        inputs = inputs_of(hessian_II, cross_II, params, name)
    return quantize_rows(weight_OI, keep_mask_OI, inputs, params, name)


def inputs_of(
    hessian_II: Tensor, cross_II: Tensor | None, params: QuantParams, name: str
) -> Inputs:
    """What gptq wants to know of a layer's inputs; arguments and errors as `quantize_weight`."""
    size = get_scheme(params.scheme).group_size_of(params, len(hessian_II))
    return Inputs.of(hessian_II, cross_II, size, params.damping, name)


class KnownInputs:
    """What gptq knows of layers' inputs, computed once for layers in a row that share them."""

    def __init__(self, params: QuantParams) -> None:
        self._params = params
        self._known: tuple[Tensor, Inputs] | None = None

    def of(self, hessian_II: Tensor, cross_II: Tensor | None, name: str) -> Inputs | None:
        """`inputs_of` those of a layer, by the identity of their Hessian; None of rtn."""
        if self._params.method != "gptq":
            return None
        if self._known is None or self._known[0] is not hessian_II:
            self._known = None  # before the next one takes its memory
            self._known = hessian_II, inputs_of(hessian_II, cross_II, self._params, name)
        return self._known[1]

    def forget(self) -> None:
        """Give their memory back."""
        self._known = None


def quantize_rows(
    weight_RI: Tensor, keep_RI: Tensor, inputs: Inputs | None, params: QuantParams, name: str
) -> Quantized:
    """`quantize_weight` of rows whose inputs are known; None of rtn, which ignores them."""
    scheme = get_scheme(params.scheme)
    grid, num_columns = scheme.grid(params), weight_RI.shape[1]
    group_size = scheme.group_size_of(params, num_columns)
    working_dtype = torch.promote_types(weight_RI.dtype, torch.float32)
    target_RI = weight_RI.detach().to(working_dtype).masked_fill(~keep_RI, 0.0)
    _check_range(name, target_RI, grid)
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
    damping = None if inputs is None else inputs.damping
    return Quantized(codes, dequantize(codes, weight_RI.dtype), damping)


def _check_range(name: str, target_OI: Tensor, grid: Grid) -> None:
    if not bool(torch.isfinite(target_OI).all()):
        raise NonFiniteError(f"{name}: the weight holds NaN or infinity; check the checkpoint")
    highest = float(target_OI.abs().max()) if target_OI.numel() else 0.0
    largest_scale = torch.finfo(grid.scale_dtype).max
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
    for start, stop in groups(weight_OI.shape[1], group_size):
        part = slice(start, stop)
        ones_B = weight_OI.new_ones(stop - start)
        scales_O, zeros_O = search_scales(
            weight_OI[:, part], keep_OI[:, part], ones_B, grid, params.num_scale_steps
        )
        zeros_O1 = None if zeros_O is None else zeros_O[:, None]
        levels_OI[:, part] = grid.nearest(weight_OI[:, part], scales_O[:, None], zeros_O1)
        scales.append(scales_O)
        zeros.append(zeros_O)
    levels_OI.masked_fill_(~keep_OI, 0.0)
    return Levels.of(levels_OI, scales, zeros)
