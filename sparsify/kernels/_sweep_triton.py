"""SparseGPT's sweep for GPUs: one kernel per block of columns, one product after it.

A stack of weights, each with its U, has a leading dimension and takes the launches of one. Shape
suffixes: O output features (rows), I input features (columns), R rows of one program, B
columns of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from sparsify.kernels._columns_triton import (
    MAX_COLUMNS,
    ROWS,
    column_of,
    highest,
    pushed_right,
)
from sparsify.kernels.precision import add_product_
from sparsify.kernels.triton_jit import jit, require_triton, tl, triton

_MAX_GRAPH_ELEMENTS = 2**24  # of the weight and of U: bounds the memory that recordings hold

_MAX_GRAPHS = 8


def sweep(
    work_OI: Tensor,
    upper_II: Tensor,
    num_kept: int,
    group: int,
    block_size: int,
    allowed_OI: Tensor | None,
    is_mask_fixed: bool,
) -> tuple[Tensor, Tensor]:
    """See `sweep.sweep`, for float32 and groups of 1, 2, 4, 8 or 16 columns.

    Blocks have `block_size` columns or 128, whichever is less. On a GPU, where weight and U have
    at most 2^24 elements each, the launches are recorded once per shape and replayed, because
    small launches can take longer to start than to run. The last 8 shapes stay recorded, each with
    its own copy of the weight, U and the masks.

    Raises:
        InputError: Triton is not installed.
    """
    require_triton()
    width = min(block_size, MAX_COLUMNS)
    inputs = [work_OI.contiguous(), upper_II.contiguous()]
    if allowed_OI is not None:
        inputs.append(allowed_OI.contiguous())
    settings = (num_kept, group, width, is_mask_fixed)
    with torch.cuda.device_of(work_OI):
        num_elements = max(work_OI.numel(), upper_II.numel())
        if work_OI.is_cuda and work_OI.numel() and num_elements <= _MAX_GRAPH_ELEMENTS:
            shapes = tuple(tuple(given.shape) for given in inputs)
            return _recorded(settings, shapes, work_OI.device).replay(inputs)
        return _sweep_(settings, work_OI.clone(memory_format=torch.contiguous_format), *inputs[1:])


def _sweep_(
    settings: tuple[int, int, int, bool],
    work_OI: Tensor,
    upper_II: Tensor,
    allowed_OI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the blocks in turn; `work_OI` becomes the pruned weight."""
    num_kept, group, width, is_mask_fixed = settings
    num_rows, num_columns = work_OI.shape[-2:]
    keep_OI = torch.empty_like(work_OI, dtype=torch.bool)
    error_OB = work_OI.new_empty(*work_OI.shape[:-1], width)
    inverse_I = upper_II.diagonal(dim1=-2, dim2=-1).reciprocal()
    grid = (triton.cdiv(num_rows, ROWS), work_OI.shape[:-2].numel())
    for start in range(0, num_columns, width):
        stop = min(start + width, num_columns)
        if num_rows:
            _sweep_block_kernel[grid](
                work_OI, error_OB, keep_OI, work_OI if allowed_OI is None else allowed_OI,
                upper_II, inverse_I, num_rows, num_columns, start, width,
                WIDTH=stop - start, N=num_kept, M=group,
                HAS_ALLOWED=allowed_OI is not None, IS_FIXED=is_mask_fixed,
                R=ROWS, B=triton.next_power_of_2(width), num_warps=4,
            )  # fmt: skip
        if stop < num_columns:
            after_BI = upper_II[..., start:stop, stop:]
            add_product_(work_OI[..., stop:], error_OB, after_BI, alpha=-1)
    return work_OI, keep_OI


@jit
def _sweep_block_kernel(
    work_ptr: tl.tensor,
    error_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    allowed_ptr: tl.tensor,
    upper_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    start: tl.tensor,
    error_stride: tl.tensor,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    IS_FIXED: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """Solve columns start to start + WIDTH of R rows, which stay in registers meanwhile."""
    matrix = tl.program_id(1).to(tl.int64)  # of the stack
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns = tl.arange(0, B)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    rows += matrix * num_rows
    first = matrix * num_columns + start
    places = rows[:, None] * num_columns + start + columns[None, :]
    work = tl.load(work_ptr + places, mask=inside, other=0.0)
    inverse = tl.load(inverse_ptr + first + columns, mask=columns < WIDTH, other=0.0)
    kept = tl.zeros((R, B), dtype=tl.int32)
    allowed = kept
    if HAS_ALLOWED:
        allowed = tl.load(allowed_ptr + places, mask=inside, other=0).to(tl.int32)
    for left in range(0, WIDTH, M):
        if IS_FIXED:
            kept = allowed
        else:
            score = tl.abs(work * inverse[None, :])
            if HAS_ALLOWED:
                score = tl.where(allowed != 0, score, -1.0)
            chosen = highest(score, columns, left, N, M).to(tl.int32)
            if HAS_ALLOWED:
                chosen = chosen & allowed
            in_group = (columns >= left) & (columns < left + M)
            kept = tl.where(in_group[None, :], chosen, kept)
        for k in tl.static_range(M):
            column = left + k
            error = tl.where(kept != 0, 0.0, work * inverse[None, :])
            error_R = column_of(error, columns, column)
            row = (first + column) * num_columns + start
            work = pushed_right(work, error_R, upper_ptr + row, columns, column, WIDTH)
    # No column changed after its own turn, so its error can still be told.
    error = tl.where(kept != 0, 0.0, work * inverse[None, :])
    tl.store(error_ptr + rows[:, None] * error_stride + columns[None, :], error, mask=inside)
    tl.store(work_ptr + places, tl.where(kept != 0, work, 0.0), mask=inside)
    tl.store(keep_ptr + places, kept != 0, mask=inside)


class _Recording:
    """The launches of one shape as a CUDA graph, with the tensors that it reads and writes."""

    def __init__(self, run: Callable[..., tuple[Tensor, Tensor]], buffers: list[Tensor]) -> None:
        self._buffers = buffers
        # The first run compiles the kernel and sets up the products, which a recording must not.
        side = _recording_stream(buffers[0].device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may ask for memory meanwhile (`sparsify.calibration.lookahead`).
        with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
            self._results = run(*buffers)

    def replay(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Run on `inputs`; the results are copies, which the next replay does not touch."""
        for buffer, given in zip(self._buffers, inputs, strict=True):
            buffer.copy_(given)
        self._graph.replay()
        pruned_OI, keep_OI = self._results
        return pruned_OI.clone(), keep_OI.clone()


@lru_cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Of a priority of its own: torch deals out 32 streams of each again and again, and what other
    threads do on a stream that is being recorded would be recorded too."""
    return torch.cuda.Stream(device, priority=-1)


@lru_cache(maxsize=_MAX_GRAPHS)
def _recorded(
    settings: tuple[int, int, int, bool],
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
) -> _Recording:
    """The recording of these settings and shapes; the least recently used one makes room."""
    buffers = [torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes[:2]]
    buffers[1].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    buffers += [torch.ones(shape, device=device, dtype=torch.bool) for shape in shapes[2:]]
    return _Recording(lambda *tensors: _sweep_(settings, *tensors), buffers)
