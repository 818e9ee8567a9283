"""Prune a whole model in one shot: any method, any pattern, rows of each layer shared by processes.

Shape suffixes: O output features (rows of a weight), I input features, R this process's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsify.calibrate import Layer, prunable_linears, walk_blocks
from sparsify.comm import Comm
from sparsify.methods import Method, PruneParams
from sparsify.pattern import Pattern, check_divides, require_pattern


@dataclass
class LayerReport:
    """What pruning did to one layer."""

    name: str
    """full dotted name, without ".weight\""""
    block: int
    """index of the decoder block"""
    shape: tuple[int, int]
    """(output features, input features)"""
    num_tokens: int
    """calibration tokens behind the Hessian"""
    error: float
    """tr((W - Z) H (W - Z)^T): mean square output error per calibration token, summed over rows"""
    relative_error: float
    """error / tr(W H W^T); 0 when the layer's output was zero anyway"""
    sparsity: float
    """share of the weights that were pruned"""
    damping: float | None
    """damping that was used; larger than asked for when the Hessian needed it; None: no damping"""
    num_dead_columns: int
    """input columns that were zero on every calibration token"""


@dataclass
class PruneResult:
    """Masks and figures of a pruned model; its weights were changed in place."""

    keep_masks: dict[str, Tensor] = field(default_factory=dict)
    """layer name -> bool (O, I) on the CPU, True = survives"""
    layers: list[LayerReport] = field(default_factory=list)
    """in the order in which they were pruned"""


def prune_model(
    model: nn.Module,
    rows: Tensor,
    method: Method,
    pattern: Pattern,
    params: PruneParams,
    *,
    comm: Comm,
    batch_size: int,
    skip: Sequence[str] = (),
    on_block: Callable[[int, int], None] | None = None,
) -> PruneResult:
    """Prune every linear layer of the decoder blocks in place, block by block.

    Hessians are collected for every method, because the reported errors need them. Each process
    solves its share of a layer's rows, which are independent given the Hessian; all of them end
    with the same weights, masks and reports.

    Args:
        model: a transformers decoder.
        rows: int64 calibration token ids (N, T) without padding, the same on all processes.
        method: from `methods.get_method`.
        pattern: must divide every layer's input columns.
        params: numbers for the method.
        comm: the processes that take part.
        batch_size: rows per forward.
        skip: glob patterns of layer names to leave dense.
        on_block: called as on_block(blocks done, blocks in all).

    Raises:
        InputError: a layer's columns cannot be cut into groups (before anything is changed), or
            see `calibrate.walk_blocks`.
        NonFiniteError, SingularHessianError, CalibrationError: see `calibrate.walk_blocks`.
        PatternViolationError: a method returned more nonzeros than the pattern allows.

    Cost: that of `walk_blocks`, of the method, and O I^2 twice per layer for the errors.
    """
    for _, name, module in prunable_linears(model, skip):
        check_divides(name, module.in_features, pattern)
    result = PruneResult()

    def solve(layer: Layer) -> None:
        keep_mask_OI, report = _prune_layer(layer, method, pattern, params, comm)
        result.keep_masks[layer.name] = keep_mask_OI
        result.layers.append(report)

    walk_blocks(
        model,
        rows,
        solve,
        comm=comm,
        batch_size=batch_size,
        needs_hessian=True,
        skip=skip,
        on_block=on_block,
    )
    return result


def _prune_layer(
    layer: Layer, method: Method, pattern: Pattern, params: PruneParams, comm: Comm
) -> tuple[Tensor, LayerReport]:
    """Solve this process's rows, gather all of them into the module, and measure the damage."""
    hessian_II = layer.hessian_II
    assert hessian_II is not None
    weight_OI = layer.module.weight.data
    num_rows, num_columns = weight_OI.shape
    dense_RI = weight_OI[comm.row_slice(num_rows)]
    solution = method.solve(dense_RI, hessian_II, pattern, params, layer.name)
    energies = torch.stack(
        [_energy(dense_RI - solution.weight_OI, hessian_II), _energy(dense_RI, hessian_II)]
    )
    comm.all_reduce_(energies)
    error, total = energies.tolist()
    weight_OI.copy_(comm.gather_rows(solution.weight_OI, num_rows))
    require_pattern([(layer.name, weight_OI)], pattern)
    keep_mask_OI = comm.gather_rows(solution.keep_mask_OI, num_rows).cpu()
    report = LayerReport(
        name=layer.name,
        block=layer.block,
        shape=(num_rows, num_columns),
        num_tokens=layer.num_tokens,
        error=error,
        relative_error=error / total if total > 0 else 0.0,
        sparsity=1 - int(keep_mask_OI.sum()) / keep_mask_OI.numel(),
        damping=solution.damping,
        num_dead_columns=solution.num_dead_columns,
    )
    return keep_mask_OI, report


def _energy(change_RI: Tensor, hessian_II: Tensor) -> Tensor:
    """tr(D H D^T) for rows D, as a float64 scalar: mean square output per token of D."""
    change_RI = change_RI.to(hessian_II.dtype)
    return ((change_RI @ hessian_II) * change_RI).sum(dtype=torch.float64)
