"""What kernels share that choose in groups of columns, or go through a block of them one by one,
errors to the right of each.

Shape suffixes: R rows of one program, B columns of one block.
"""

from __future__ import annotations

from sparsify.kernels.triton_jit import jit, tl

ROWS = 16
"""of one program"""

MAX_COLUMNS = 128
"""of a block: what a program of 16 rows holds in registers"""


@jit
def column_of(tile: tl.tensor, columns: tl.tensor, column: tl.tensor) -> tl.tensor:
    """A column of the tile (R, B): its sum with all other columns set to zero."""
    return tl.sum(tl.where((columns == column)[None, :], tile, 0.0), axis=1)


@jit
def pushed_right(
    tile: tl.tensor,
    error: tl.tensor,
    row_ptr: tl.tensor,
    columns: tl.tensor,
    column: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """The tile (R, B) less error_R times what a matrix's row has right of `column`."""
    later = (columns > column) & (columns < WIDTH)
    row = tl.load(row_ptr + columns, mask=later, other=0.0)
    return tile - error[:, None] * row[None, :]


@jit
def highest(
    score: tl.tensor, columns: tl.tensor, left: tl.tensor, N: tl.constexpr, M: tl.constexpr
) -> tl.tensor:
    """Which of the tile (R, B) are higher than all but N - 1 of the columns left to left + M.

    Of equal scores the left one is. Outside of these columns the answer means nothing.
    """
    num_better = tl.zeros_like(score).to(tl.int32)
    for k in tl.static_range(M):
        other = column_of(score, columns, left + k)
        wins = other[:, None] > score
        ties = (other[:, None] == score) & (columns > left + k)[None, :]
        num_better += (wins | ties).to(tl.int32)
    return num_better < N
