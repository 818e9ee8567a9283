"""Prune a whole model in one shot: any method, any pattern, in memory or block by block from disk.

`prune_model` changes a model that is in memory. `prune_checkpoint` reads a checkpoint one block at
a time, writes each block when it is done, and after a kill resumes at the block it was at. Both
walk the blocks the same way (`sparsify.calibration.walk`) and share rows of calibration data and
rows of every layer among processes.
Shape suffixes: O output features (rows of a weight), I input features, R rows of one part, E layers
of a stack; there, all that is (O, I) or (I, I) has a dimension before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparsify.calibration.accumulate import TargetShares
from sparsify.calibration.checkpoint import CheckpointWalk
from sparsify.calibration.hidden_states import HiddenStateStore, Memory
from sparsify.calibration.layers import InputOrder, Layer, SolverNeeds, prunable_linears
from sparsify.calibration.moments import InputMoments, stacked
from sparsify.calibration.stacks import as_stack
from sparsify.calibration.timing import PhaseTimer, Progress
from sparsify.calibration.walk import walk_blocks
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError, TwofourError
from sparsify.masks.select import require_pattern
from sparsify.masks.storage import bits_digest, mask_from_bits, masks_to_bits, save_mask_bits
from sparsify.methods import Method, Problem, PruneParams, Solution
from sparsify.models.blocks import (
    Blocks,
    BlocksInMemory,
    BlocksOnDisk,
    ShardWriter,
    block_tensors,
)
from sparsify.pattern import Pattern, check_divides
from sparsify.pruning.one_pass import FOLDER as CODES
from sparsify.pruning.one_pass import OnePass, write_codes
from sparsify.pruning.progress import LayerReport, large_kept, output_energy
from sparsify.quantization.quantize import fragment

Existing = Literal["ignore", "keep", "extend"]

EXISTING: tuple[Existing, ...] = ("ignore", "keep", "extend")


@dataclass(frozen=True)
class LayerChoice:
    """Which layers are pruned, what their zeros mean, and how their inputs are measured."""

    skip: Sequence[str] = ()
    """glob patterns of layer names to leave dense"""
    existing: Existing = "ignore"
    """what zeros in the given weights mean: "ignore" nothing, "extend" they stay zero and others
    join them, "keep" they are the mask"""
    order: InputOrder | None = None
    """see `layers.SolverNeeds`; None: as the method has it"""
    token_weights: Tensor | None = None
    """float32 (blocks, N, T), how much each token counts; None: all the same"""


@dataclass
class PruneResult:
    """Masks and figures of a pruned model; its weights were changed in place."""

    keep_masks: dict[str, Tensor] = field(default_factory=dict)
    """layer name -> bool (O, I) on the CPU, True = survives; empty when they went to files"""
    layers: list[LayerReport] = field(default_factory=list)
    """in the order in which they were pruned"""


def prune_model(
    model: nn.Module,
    rows: TokenRows,
    method: Method,
    pattern: Pattern,
    params: PruneParams,
    *,
    comm: Comm,
    memory: Memory,
    layers: LayerChoice | None = None,
    on_block: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> PruneResult:
    """Prune every linear layer of the decoder blocks in place, block by block.

    Hessians are collected for every method, because the reported errors need them. Each process
    solves its part of a layer's rows, which are independent given the Hessian; all of them end
    with the same weights, masks and reports.

    Args:
        model: a transformers decoder.
        rows: calibration rows without padding, the same on all processes.
        method: from `methods.get_method`.
        pattern: must divide every layer's input columns.
        params: numbers for the method.
        comm: the processes that take part; with `is_fixed`, their number does not matter.
        memory: rows per forward, and whether work may be done ahead; the model is where it is.
        layers: which are pruned and how they are measured; None: all, as the method has it.
        on_block: called as on_block(blocks done, blocks in all).
        clock: returns seconds, for the times in the reports; None: no times.

    Raises:
        InputError: a layer's columns cannot be cut into groups (before anything is changed), or
            see `walk.walk_blocks`.
        NonFiniteError, SingularHessianError, CalibrationError: see `walk.walk_blocks`.
        PatternViolationError: a method returned more nonzeros than the pattern allows.

    Cost: that of `walk_blocks`, of the method, and O I^2 twice per layer for the errors.
    """
    source = BlocksInMemory(model)
    run = _Run(source, method, pattern, params, comm, layers or LayerChoice(), clock)
    result = PruneResult()

    def finish(index: int, block: nn.Module) -> None:
        bits, reports = run.take_block()
        for report in reports:
            result.keep_masks[report.name] = mask_from_bits(bits[report.name], report.shape)
        result.layers += reports
        if on_block is not None:
            on_block(index + 1, len(source.blocks))

    run.walk(rows, memory, finish)
    return result


def prune_checkpoint(
    path: str | Path,
    out: Path,
    rows: TokenRows,
    method: Method,
    pattern: Pattern,
    params: PruneParams,
    *,
    comm: Comm,
    memory: Memory,
    layers: LayerChoice | None = None,
    checkpoint_every_blocks: int = 1,
    one_pass: OnePass | None = None,
    on_block: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> PruneResult:
    """Prune a checkpoint of any size, one block in memory at a time, resumably.

    `out` receives a model folder (`model-*.safetensors`, index, config.json), `masks-*.safetensors`
    with each block's masks, and the reports; while it is being made, also the hidden states before
    the block that is next. Called again with the same arguments after a kill, it resumes there, and
    the files that come out are byte for byte those of an undisturbed run.

    Args:
        path: model folder, or "embedded"; see `models.blocks.BlocksOnDisk`.
        out: folder for the result, on a disk that all processes see.
        rows, method, pattern, params, comm, layers, on_block, clock: see `prune_model`.
        memory: where blocks and hidden states are held.
        checkpoint_every_blocks: blocks between two states that a killed run can resume from; with
            `clock` at least so many, and as many as keep their writing to a twentieth of the time.
        one_pass: quantises each layer as soon as it is pruned; the weights are then those of its
            codes, and `out` has the packed layers too (`one_pass.FOLDER`).

    Returns:
        Reports of all layers, those of an earlier call's blocks among them; no masks (see `out`).

    Raises:
        InputError: also when the checkpoint cannot be read block by block, or `out` holds
            something else.
        The rest as `prune_model`.

    Cost: that of `prune_model`, plus reading the checkpoint once, writing it once and writing the
    hidden states at every checkpoint. Memory: two blocks, on the host also the one that is written
    meanwhile, their moments, and the hidden states unless they are on disk; with `overlap` one
    block more and what the dense model has in it.
    """
    source = BlocksOnDisk(path, memory.dtype, memory.device)
    run = _Run(source, method, pattern, params, comm, layers or LayerChoice(), clock, one_pass)
    writer = ShardWriter(out, source) if comm.rank == 0 else None

    def take(index: int, block: nn.Module) -> tuple[list[LayerReport], Callable[[], None]]:
        bits, reports = run.take_block()
        codes = {} if one_pass is None else one_pass.take_block()
        if writer is None:
            return reports, lambda: None
        shapes = {report.name: report.shape for report in reports}
        with run.timer.measure("write"):
            tensors = block_tensors(f"{source.list_name}.{index}.", block)

        def write() -> None:
            writer.write_block(index, tensors)
            save_mask_bits(out / f"masks-{index + 1:05d}.safetensors", bits, shapes)
            if one_pass is not None:
                masks = {name: (bits[name], shape) for name, shape in shapes.items()}
                write_codes(out / CODES / fragment(index), codes, tensors, masks, pattern)

        return reports, write

    walk = CheckpointWalk(
        out, len(source.blocks), rows, comm, memory, "prune", checkpoint_every_blocks, on_block,
        clock,
    )  # fmt: skip
    found = walk.run(
        lambda store, first, finish: run.walk(rows, memory, finish, store, first), take, run.timer
    )
    if writer is not None:
        writer.finish(source)
    comm.barrier()
    return PruneResult(layers=[LayerReport.from_dict(layer) for layer in found])


class _Run:
    """One method on one model: solves layers as the walk hands them out, and takes notes."""

    def __init__(
        self, source: Blocks, method: Method, pattern: Pattern, params: PruneParams, comm: Comm,
        layers: LayerChoice, clock: Callable[[], float] | None, one_pass: OnePass | None = None,
    ) -> None:  # fmt: skip
        if layers.existing not in EXISTING:
            raise InputError(f"prune.existing={layers.existing}: use one of {', '.join(EXISTING)}")
        for _, name, module in prunable_linears(source.model, layers.skip):
            check_divides(name, module.in_features, pattern)
        self.timer = PhaseTimer(clock)
        self._source = source
        self._method = method
        self._pattern = pattern
        self._params = params
        self._comm = comm
        self._one_pass = one_pass
        if one_pass is not None:
            one_pass.check(source.model)
        self._choice = layers
        self._order = layers.order or method.order
        if self._order == "dense" and method.needs_teacher:
            raise InputError(
                f"prune.order=dense: {method.name} makes up for what was pruned before, which that "
                "order does not look at; use prune.order=layer or block, or prune.method=admm"
            )
        self._masks: dict[str, Tensor] = {}
        self._reports: list[LayerReport] = []
        self._pending: Callable[[], None] | None = None

    def walk(
        self, rows: TokenRows, memory: Memory, on_block: Callable[[int, nn.Module], None],
        store: HiddenStateStore | None = None, first_block: int = 0,
    ) -> None:  # fmt: skip
        """Visit the blocks from `first_block` on."""
        method, params = self._method, self._params
        needs = SolverNeeds(
            teacher=method.needs_teacher,
            target_shares=TargetShares(params.teacher_share, params.residual_share),
            factor_damping=params.damping if method.needs_factor else None,
            order=self._order,
            token_weights=self._choice.token_weights,
        )
        progress = Progress(on_block, self._wait_for_pending, self.timer)
        walk_blocks(
            self._source, rows, lambda layer: self._solve_stack([layer]), comm=self._comm,
            memory=memory, needs=needs, skip=self._choice.skip, store=store,
            first_block=first_block, progress=progress,
            solve_stack=self._solve_stack if method.takes_stacks else None,
        )  # fmt: skip

    def take_block(self) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Packed masks and reports since the last call; the block's times go to its layers."""
        masks, reports = self._masks, self._reports
        self._masks, self._reports = {}, []
        for phase, seconds in self.timer.take().items():
            for report in reports:
                report.seconds[phase] = seconds / len(reports)
        return masks, reports

    def _solve_stack(self, layers: list[Layer]) -> None:
        """Solve those together that have the same of a teacher, took the same damping, and are all
        quantised or all not; or a layer by itself."""
        if self._one_pass is not None:
            self._one_pass.begin(layers)
        alike: dict[object, list[Layer]] = {}
        for layer in layers:
            factor = layer.moments.known_factor(self._params.damping)
            used = None if factor is None else factor.damping
            has = layer.wanted_OI is not None, layer.moments.cross_II is not None
            stays = self._one_pass is not None and self._one_pass.skips(layer)
            alike.setdefault((used, has, stays), []).append(layer)
        for found in alike.values():
            self._solve(found)

    def _solve(self, layers: list[Layer]) -> None:
        """Solve this process's rows of a layer or stack, measure the damage, gather all rows.

        They are gathered while the next layers are solved, and put into the modules after that.
        """
        with self.timer.measure("solve"):
            moments = stacked([layer.moments for layer in layers])
            weight_OI = as_stack([layer.module.weight.data for layer in layers])
            num_rows = weight_OI.shape[-2]
            dense_RI = weight_OI[..., self._comm.row_slice(num_rows), :]
            solution = self._solve_rows(layers, weight_OI, moments)
            sums = torch.stack(
                [
                    output_energy(dense_RI - solution.weight_OI, moments.hessian_II),
                    output_energy(dense_RI, moments.hessian_II),
                    *large_kept(dense_RI, solution.keep_mask_OI),
                ]
            )
        self._wait_for_pending()
        with self.timer.measure("gather"):
            gathered = [
                self._comm.gather_rows(found.movedim(-2, 0), num_rows)
                for found in (solution.weight_OI, solution.keep_mask_OI)
            ]
        rounding: list[float | None] = [None] * len(layers)
        if self._one_pass is not None:
            rounding = self._one_pass.finish(layers, self._comm, num_rows)
        self._pending = partial(self._finish, layers, solution, sums, gathered, rounding)

    def _wait_for_pending(self) -> None:
        """Put the layers that were solved last into their modules, if they are not yet there."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending()

    def _finish(
        self, layers: list[Layer], solution: Solution, sums: Tensor,
        gathered: list[Callable[[], Tensor]], rounding: list[float | None],
    ) -> None:  # fmt: skip
        """Take over the rows of all processes, and report."""
        shape = layers[0].module.out_features, layers[0].module.in_features
        with self.timer.measure("gather"):
            weight_EOI, keep_EOI = (wait().movedim(0, -2).view(-1, *shape) for wait in gathered)
            for layer, weight_OI in zip(layers, weight_EOI, strict=True):
                layer.module.weight.data.copy_(weight_OI)
            bits = [of_one.clone() for of_one in masks_to_bits(keep_EOI).cpu()]
            self._comm.all_reduce_(sums)
        names = [layer.name for layer in layers]
        require_pattern(zip(names, weight_EOI, strict=True), self._pattern)
        num_kept = keep_EOI.sum((1, 2)).tolist()
        num_dead = torch.as_tensor(solution.num_dead_columns).expand(len(layers)).tolist()
        figures = sums.view(len(sums), -1).T.tolist()
        for at, layer in enumerate(layers):
            error, total, num_large_kept, num_large = figures[at]
            factor = layer.moments.known_factor(self._params.damping)
            self._masks[layer.name] = bits[at]
            self._reports.append(
                LayerReport(
                    name=layer.name,
                    block=layer.block,
                    shape=shape,
                    num_tokens=layer.moments.num_tokens,
                    tokens_per_column=layer.moments.tokens_per_column,
                    error=error,
                    relative_error=error / total if total > 0 else 0.0,
                    sparsity=1 - num_kept[at] / keep_EOI[at].numel(),
                    damping=solution.damping,
                    num_dead_columns=num_dead[at],
                    condition=factor.condition if factor is not None else None,
                    large_kept=num_large_kept / num_large,
                    keep_mask_sha256=bits_digest(bits[at], shape),
                    rounding_error=rounding[at],
                    num_lent=layer.moments.num_lent,
                )
            )

    def _solve_rows(
        self, layers: list[Layer], weight_OI: Tensor, moments: InputMoments
    ) -> Solution:
        """The solutions of this process's lanes of rows, one below the other."""
        parts = [part for part in self._comm.lanes(weight_OI.shape[-2]) if part.start < part.stop]
        solutions = [self._solve_part(layers, weight_OI, moments, part) for part in parts]
        if not solutions:
            empty_RI = weight_OI[..., :0, :]
            nothing = Solution(empty_RI, empty_RI.bool(), None, 0)
            return self._rounded(layers, moments, nothing)
        if len(solutions) == 1:
            return solutions[0]
        return replace(
            solutions[0],
            weight_OI=torch.cat([s.weight_OI for s in solutions], dim=-2),
            keep_mask_OI=torch.cat([s.keep_mask_OI for s in solutions], dim=-2),
        )

    def _solve_part(
        self, layers: list[Layer], weight_OI: Tensor, moments: InputMoments, part: slice
    ) -> Solution:
        """The solution of some rows of one layer, or of each of a stack."""
        try:
            found = self._sparsified(layers, weight_OI, moments, part)
        except TwofourError:
            for layer in layers if len(layers) > 1 else []:  # which of them it is
                self._sparsified([layer], layer.module.weight.data, layer.moments, part)
            raise
        return self._rounded(layers, moments, found)

    def _sparsified(
        self, layers: list[Layer], weight_OI: Tensor, moments: InputMoments, part: slice
    ) -> Solution:
        """What the method makes of some rows."""
        rows_RI, existing = weight_OI[..., part, :], self._choice.existing
        wanted = [layer.wanted_OI[part] for layer in layers if layer.wanted_OI is not None]
        problem = Problem(
            layers[0].name, rows_RI, moments, as_stack(wanted) if wanted else None,
            None if existing == "ignore" else rows_RI != 0, is_mask_fixed=existing == "keep",
        )  # fmt: skip
        return self._method.solve(problem, self._pattern, self._params)

    def _rounded(
        self, layers: list[Layer], moments: InputMoments, solution: Solution
    ) -> Solution:  # fmt: skip
        """With the values of its codes, where the walk quantises too."""
        if self._one_pass is None:
            return solution
        return self._one_pass.solve(layers, moments.hessian_II, solution)
