"""Quantise a whole pruned model, block by block: in memory, or a checkpoint of any size from disk.

The mathematics of one weight is in `sparsify.quantization.weight`.
Shape suffixes: O output features (rows), I input features (columns), R this process's rows. Of a
stack of layers all tensors have a leading dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsify.calibration.checkpoint import CheckpointWalk
from sparsify.calibration.hessian import row_energies
from sparsify.calibration.hidden_states import HiddenStateStore, Memory
from sparsify.calibration.layers import Layer, SolverNeeds, prunable_linears, skipped_linears
from sparsify.calibration.stacks import as_stack
from sparsify.calibration.timing import PhaseTimer, Progress
from sparsify.calibration.walk import walk_blocks
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.models.blocks import Blocks, BlocksInMemory, BlocksOnDisk
from sparsify.packed.layer import Codes, pack_layer
from sparsify.params import QuantParams
from sparsify.pattern import Pattern
from sparsify.quantization.codes import Quantized, dequantize
from sparsify.quantization.weight import KnownInputs, quantize_rows
from sparsify.tensors import METADATA, write_tensors


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
    each weight; all end with the same result. Layers without a mask stay as they are. On a GPU a
    mixture's experts are solved as stacks (`calibration.stacks`).

    Args:
        model: a transformers decoder.
        rows: calibration rows without padding, the same on all processes.
        keep_masks: layer name -> bool (O, I), True = survives.
        params: scheme, method and numbers. Hessians are collected for rtn too: the report needs
            them.
        comm: the processes that take part; with `is_fixed`, their number does not matter.
        batch_size: rows per forward.
        skip: glob patterns of layers to leave as they are.
        on_block: called as on_block(blocks done, blocks in all).

    Raises:
        InputError: no masks, or a mask without a layer or of another shape; see also
            `walk.walk_blocks` and `quantize_weight`.
        NonFiniteError, SingularHessianError, CalibrationError: see `walk.walk_blocks`.

    Cost: that of `walk_blocks` and of `quantize_weight` per layer.
    """
    source = BlocksInMemory(model)
    run = _Run(source, keep_masks, params, comm, skip)
    result = QuantResult()

    def finish(index: int, _: nn.Module) -> None:
        layers, reports = run.take_block()
        result.layers.update(layers)
        result.reports += reports
        if on_block is not None:
            on_block(index + 1, len(source.blocks))

    run.walk(rows, Memory(batch_size), finish)
    return result


def quantize_checkpoint(
    path: str | Path,
    out: Path,
    rows: TokenRows,
    keep_masks: Mapping[str, Tensor],
    pattern: Pattern,
    params: QuantParams,
    *,
    comm: Comm,
    memory: Memory,
    skip: Sequence[str] = (),
    checkpoint_every_blocks: int = 1,
    clock: Callable[[], float] | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> list[QuantLayerReport]:
    """`quantize_model` for a checkpoint of any size, one block in memory at a time, resumably.

    `out` receives `fragment-*.safetensors` with the packed layers of each block, and the reports;
    while it is being made, also the hidden states before the block that is next. Called again with
    the same arguments after a kill, it resumes there, and the fragments that come out are byte for
    byte those of an undisturbed run.

    Args:
        path: model folder; see `models.blocks.BlocksOnDisk`.
        out: folder for fragments and state, on a disk that all processes see.
        keep_masks: as `quantize_model`; each is read when its layer is quantised.
        pattern: of the masks.
        memory: where blocks and hidden states are held.
        checkpoint_every_blocks, clock: as `prune_checkpoint`.
        rows, params, comm, skip, on_block: see `quantize_model`.

    Returns:
        Reports of all layers, those of an earlier call's blocks among them.

    Raises:
        InputError: also when the checkpoint cannot be read block by block, or `out` holds
            something else.
        PatternViolationError: a pruned weight is not zero.
        The rest as `quantize_model`.

    Cost: that of `quantize_model`, plus reading the checkpoint once. Memory: two blocks, their
    moments, and the hidden states unless they are on disk.
    """
    source = BlocksOnDisk(path, memory.dtype, memory.device)
    run = _Run(source, keep_masks, params, comm, skip)

    def take(index: int, block: nn.Module) -> tuple[list[QuantLayerReport], Callable[[], None]]:
        layers, reports = run.take_block()

        def write() -> None:
            tensors: dict[str, Tensor] = {}
            for name, found in layers.items():
                _, parts = pack_layer(name, found.weight_OI, keep_masks[name], pattern, found.codes)
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            write_tensors(out / fragment(index), tensors, METADATA)

        return reports, write if comm.rank == 0 else lambda: None

    walk = CheckpointWalk(
        out, len(source.blocks), rows, comm, memory, "quantize", checkpoint_every_blocks, on_block,
        clock,
    )  # fmt: skip
    found = walk.run(
        lambda store, first, finish: run.walk(rows, memory, finish, store, first), take,
        PhaseTimer(),
    )  # fmt: skip
    comm.barrier()
    return [QuantLayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in found]


def fragment(index: int) -> str:
    """Name of the file with a block's packed layers."""
    return f"fragment-{index + 1:05d}.safetensors"


class _Run:
    """One scheme on one model: quantises layers as the walk hands them out, and takes notes."""

    def __init__(
        self, source: Blocks, keep_masks: Mapping[str, Tensor], params: QuantParams, comm: Comm,
        skip: Sequence[str],
    ) -> None:  # fmt: skip
        self._source = source
        self._keep_masks = keep_masks
        self._params = params
        self._comm = comm
        self._left_out = _left_out(source.model, keep_masks, skip)
        self._layers: dict[str, Quantized] = {}
        self._reports: list[QuantLayerReport] = []
        self._inputs = KnownInputs(params, params.has_teacher)

    def walk(
        self, rows: TokenRows, memory: Memory, on_block: Callable[[int, nn.Module], None],
        store: HiddenStateStore | None = None, first_block: int = 0,
    ) -> None:  # fmt: skip
        """Visit the blocks from `first_block` on."""
        walk_blocks(
            self._source, rows, lambda layer: self._solve([layer]), comm=self._comm, memory=memory,
            skip=self._left_out, needs=SolverNeeds(teacher=self._params.has_teacher, order="layer"),
            store=store, first_block=first_block, progress=Progress(on_block),
            solve_stack=self._solve,
        )  # fmt: skip

    def take_block(self) -> tuple[dict[str, Quantized], list[QuantLayerReport]]:
        """Codes and reports since the last call."""
        layers, reports = self._layers, self._reports
        self._layers, self._reports = {}, []
        self._inputs.forget()
        return layers, reports

    def _solve(self, layers: list[Layer]) -> None:
        """Solve this process's rows of a layer or stack, gather all of them into the modules, and
        measure the damage."""
        comm, dtype = self._comm, layers[0].module.weight.dtype
        num_rows, num_columns = layers[0].module.weight.shape
        keep_OI = as_stack([self._mask_of(layer) for layer in layers])
        self._inputs.begin(layers)
        inputs = self._inputs.of(layers)
        weight_OI = as_stack([layer.module.weight.data for layer in layers])
        names = [layer.name for layer in layers]
        mine = joined(
            [
                quantize_rows(
                    weight_OI[..., lane, :], keep_OI[..., lane, :].to(weight_OI.device), inputs,
                    self._params, names,
                )
                for lane in comm.lanes(num_rows)
            ]
        )  # fmt: skip
        hessian_II = as_stack([layer.moments.hessian_II for layer in layers])
        before_RI = weight_OI[..., comm.row_slice(num_rows), :].to(hessian_II.dtype)
        change_RI = before_RI - mine.weight_OI.to(hessian_II.dtype)
        energies = torch.stack(
            [row_energies(rows_RI, hessian_II).sum(-1) for rows_RI in (change_RI, before_RI)]
        ).double()
        comm.all_reduce_(energies)
        codes = gathered(mine.codes, comm, num_rows)
        found = [Quantized(of_one, dequantize(of_one, dtype)) for of_one in codes]
        self._layers |= zip(names, found, strict=True)
        # One copy to the device for all of a stack, which waits for it.
        stack_OI = as_stack([each.weight_OI for each in found]).to(weight_OI.device)
        for layer, new_OI in zip(layers, stack_OI.view(-1, num_rows, num_columns), strict=True):
            layer.module.weight.data.copy_(new_OI)
        figures = energies.view(2, -1).T.tolist()
        dampings = [None] * len(layers) if inputs is None else inputs.dampings
        for layer, (error, total), damping in zip(layers, figures, dampings, strict=True):
            self._reports.append(
                QuantLayerReport(
                    name=layer.name,
                    block=layer.block,
                    shape=(num_rows, num_columns),
                    num_tokens=layer.moments.num_tokens,
                    error=error,
                    relative_error=error / total if total > 0 else 0.0,
                    damping=damping,
                )
            )

    def _mask_of(self, layer: Layer) -> Tensor:
        """A layer's mask, of its weight's shape."""
        keep_OI, shape = self._keep_masks[layer.name], tuple(layer.module.weight.shape)
        if keep_OI.shape != shape:
            raise InputError(
                f"mask of layer {layer.name}: shape {tuple(keep_OI.shape)}, the weight has "
                f"{shape}; masks and model are of different runs"
            )
        return keep_OI


def _left_out(model: nn.Module, keep_masks: Mapping[str, Tensor], skip: Sequence[str]) -> list[str]:
    """Names of the layers without a mask and of those that are to be skipped, after checking that
    every mask has its layer."""
    layers = [name for _, name, _ in prunable_linears(model)]
    known = set(layers)
    for name in keep_masks:
        if name not in known:
            raise InputError(f"mask of layer {name}: the model has no such linear layer in a block")
    if not keep_masks:
        raise InputError("quantize: no layer has a keep mask, so there is nothing to quantise")
    skipped = skipped_linears(model, skip, "quantize.skip")
    left_out = [name for name in layers if name not in keep_masks or name in skipped]
    if len(left_out) == len(layers):
        raise InputError("quantize.skip: every pruned layer is skipped; leave one to quantise")
    return left_out


def gathered(codes: Codes, comm: Comm, num_rows: int) -> list[Codes]:
    """Codes of all processes' rows, on the CPU, from those of this one's; one for each layer."""

    def whole(part: Tensor) -> list[Tensor]:
        """As bytes or numbers that all of torch knows."""
        rows = part.view(_plain(part)).movedim(-2, 0)
        found = comm.gather_rows(rows, num_rows)().movedim(0, -2).cpu()
        return [each.contiguous().view(part.dtype) for each in found.view(-1, *found.shape[-2:])]

    zeros = None if codes.zeros_OG is None else whole(codes.zeros_OG)
    return [
        Codes(values_OI, scales_OG, codes.scheme, None if zeros is None else zeros[at])
        for at, (values_OI, scales_OG) in enumerate(
            zip(whole(codes.values_OI), whole(codes.scales_OG), strict=True)
        )
    ]


def joined(parts: list[Quantized]) -> Quantized:
    """Rows one below the other."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.codes.zeros_OG for part in parts if part.codes.zeros_OG is not None]
    codes = Codes(
        _cat([part.codes.values_OI for part in parts]),
        _cat([part.codes.scales_OG for part in parts]),
        parts[0].codes.scheme,
        _cat(zeros) if zeros else None,
    )
    return Quantized(codes, _cat([part.weight_OI for part in parts]))


def _cat(parts: list[Tensor]) -> Tensor:
    """Also of float8, which torch does not concatenate everywhere."""
    return torch.cat([part.view(_plain(part)) for part in parts], -2).view(parts[0].dtype)


def _plain(part: Tensor) -> torch.dtype:
    return torch.uint8 if part.dtype == torch.float8_e4m3fn else part.dtype
