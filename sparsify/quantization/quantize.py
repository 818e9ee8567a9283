"""Quantise a whole pruned model, block by block: the walk, the processes' shares, the reports.

The mathematics of one weight is in `sparsify.quantization.weight`.
Shape suffixes: O output features (rows), I input features (columns), R this process's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from sparsify.calibration.hessian import row_energies
from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.layers import Layer, SolverNeeds, prunable_linears, skipped_linears
from sparsify.calibration.timing import Progress
from sparsify.calibration.walk import walk_blocks
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.models.blocks import BlocksInMemory
from sparsify.models.isolation import check_isolation
from sparsify.packed.layer import Codes
from sparsify.params import QuantParams
from sparsify.quantization.codes import Quantized, dequantize
from sparsify.quantization.weight import quantize_weight


@dataclass
class QuantLayerReport:
    """What quantisation did to one layer."""

    name: str
    """full dotted name, without ".weight\""""
    block: int
    """index of the decoder block"""
    shape: tuple[int, int]
    """(output features, input features)"""
    num_tokens: int
    """calibration tokens that the Hessian was summed over"""
    error: float
    """tr((W - Q) H (W - Q)^T): mean square output error per calibration token, summed over rows"""
    relative_error: float
    """error / tr(W H W^T); 0 when the layer's output was zero anyway"""
    damping: float | None
    """damping that was used; larger than asked for when the Hessian needed it; None for rtn"""


@dataclass
class QuantResult:
    """Codes, scales and figures of a quantised model; its weights were changed in place."""

    layers: dict[str, Quantized] = field(default_factory=dict)
    """layer name -> codes and scales, on the CPU"""
    reports: list[QuantLayerReport] = field(default_factory=list)
    """in the order in which they were quantised"""


def quantize_model(
    model: nn.Module,
    rows: TokenRows,
    keep_masks: Mapping[str, Tensor],
    params: QuantParams,
    *,
    comm: Comm,
    batch_size: int,
    skip: Sequence[str] = (),
    on_block: Callable[[int, int], None] | None = None,
) -> QuantResult:
    """Quantise every pruned layer of the model in place, block by block.

    The target is the model as given (pruned and recovered). Each block is calibrated on what the
    quantised blocks before it put out. Processes share rows of the calibration data and rows of
    each weight; all end with the same result. Layers without a mask stay as they are.

    Args:
        model: a transformers decoder.
        rows: calibration rows without padding, the same on all processes.
        keep_masks: layer name -> bool (O, I), True = survives.
        params: method and numbers. Hessians are collected for rtn too: the report needs them.
        comm: the processes that take part.
        batch_size: rows per forward.
        skip: glob patterns of layers to leave as they are.
        on_block: called as on_block(blocks done, blocks in all).

    Raises:
        InputError: no masks, or a mask without a layer or of another shape; the model cannot keep
            the documents of a row apart; see also `walk.walk_blocks` and `quantize_weight`.
        NonFiniteError, SingularHessianError, CalibrationError: see `walk.walk_blocks`.

    Cost: that of `walk_blocks` and of `quantize_weight` per layer.
    """
    result = QuantResult()
    left_out = _left_out(model, keep_masks, skip)
    if rows.is_joined:
        check_isolation(model)

    def solve(layer: Layer) -> None:
        quantized, report = _quantize_layer(layer, keep_masks[layer.name], params, comm)
        result.layers[layer.name] = quantized
        result.reports.append(report)

    source = BlocksInMemory(model)

    def report(index: int, _: nn.Module) -> None:
        if on_block is not None:
            on_block(index + 1, len(source.blocks))

    has_teacher = params.method == "gptq" and params.teacher_share > 0
    walk_blocks(
        source, rows, solve, comm=comm, memory=Memory(batch_size), skip=left_out,
        needs=SolverNeeds(teacher=has_teacher, order="layer"), progress=Progress(report),
    )  # fmt: skip
    return result


def _left_out(model: nn.Module, keep_masks: Mapping[str, Tensor], skip: Sequence[str]) -> list[str]:
    """Names of the layers without a mask and of those that are to be skipped, after checking that
    every mask has its layer."""
    layers = {name: module for _, name, module in prunable_linears(model)}
    for name, keep_mask_OI in keep_masks.items():
        if name not in layers:
            raise InputError(f"mask of layer {name}: the model has no such linear layer in a block")
        expected = tuple(layers[name].weight.shape)
        if tuple(keep_mask_OI.shape) != expected:
            raise InputError(
                f"mask of layer {name}: shape {tuple(keep_mask_OI.shape)}, the weight has "
                f"{expected}; masks and model are of different runs"
            )
    if not keep_masks:
        raise InputError("quantize: no layer has a keep mask, so there is nothing to quantise")
    skipped = skipped_linears(model, skip, "quantize.skip")
    left_out = [name for name in layers if name not in keep_masks or name in skipped]
    if len(left_out) == len(layers):
        raise InputError("quantize.skip: every pruned layer is skipped; leave one to quantise")
    return left_out


def _quantize_layer(
    layer: Layer, keep_mask_OI: Tensor, params: QuantParams, comm: Comm
) -> tuple[Quantized, QuantLayerReport]:
    """Solve this process's rows, gather all of them into the module, and measure the damage."""
    hessian_II = layer.moments.hessian_II
    weight_OI = layer.module.weight.data
    num_rows, num_columns = weight_OI.shape
    share = comm.row_slice(num_rows)
    before_RI = weight_OI[share].to(hessian_II.dtype)
    keep_RI = keep_mask_OI[share].to(weight_OI.device)
    mine = quantize_weight(
        weight_OI[share], keep_RI, hessian_II, params, layer.name, layer.moments.cross_II
    )
    change_RI = before_RI - mine.weight_OI.to(hessian_II.dtype)
    energies = torch.stack(
        [row_energies(rows_RI, hessian_II).sum() for rows_RI in (change_RI, before_RI)]
    ).double()
    comm.all_reduce_(energies)
    error, total = energies.tolist()
    codes = _gather(mine.codes, num_rows, comm)
    weight_OI.copy_(dequantize(codes, weight_OI.dtype))
    report = QuantLayerReport(
        name=layer.name,
        block=layer.block,
        shape=(num_rows, num_columns),
        num_tokens=layer.moments.num_tokens,
        error=error,
        relative_error=error / total if total > 0 else 0.0,
        damping=mine.damping,
    )
    on_cpu = replace(
        codes, values_OI=codes.values_OI.cpu(), scales_OG=codes.scales_OG.cpu(),
        zeros_OG=None if codes.zeros_OG is None else codes.zeros_OG.cpu(),
    )  # fmt: skip
    return Quantized(on_cpu, weight_OI.cpu().clone(), mine.damping), report


def _gather(codes: Codes, num_rows: int, comm: Comm) -> Codes:
    """The codes of all processes' rows."""

    def whole(part: Tensor) -> Tensor:
        as_bytes = part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part
        return comm.gather_rows(as_bytes, num_rows)().view(part.dtype)

    zeros_OG = None if codes.zeros_OG is None else whole(codes.zeros_OG)
    return Codes(whole(codes.values_OI), whole(codes.scales_OG), codes.scheme, zeros_OG)
