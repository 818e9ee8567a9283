"""What kernels share that go through a block of columns one by one, errors to the right of each.

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
