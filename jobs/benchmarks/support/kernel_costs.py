"""What a launch costs of kernels that are no operations of torch: Triton's, and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from jobs.benchmarks.support.op_costs import Cost, bytes_of, tensors_of


def varlen_cost(name: str, args: Sequence[Any], out: Any, lengths: Sequence[int]) -> Cost:
    """Attention of whole documents, `varlen_attn` or its backward pass.

    Half of each document's pairs, and 2.5 times as much backward, where the scores are computed
    again (five products for two; Dao 2023, arXiv 2307.08691, section 3.1).

    Args:
        name: of the operation, without namespace.
        args: what it is given; the queries are (P, H, D).
        out: what it returns.
        lengths: tokens of the documents, P together.
    """
    is_backward = name.endswith("backward")
    query: Tensor = args[1 if is_backward else 0]
    assert sum(lengths) == query.shape[0], f"{query.shape[0]} tokens in documents of {lengths}"
    pairs = sum(length**2 / 2 for length in lengths)
    operations = 4.0 * math.prod(query.shape[1:]) * pairs * (2.5 if is_backward else 1.0)
    return Cost("attention", operations, bytes_of(tensors_of(list(args), out)))


def _gram(named: dict[str, Any]) -> Cost:
    """Half of X^T X, in bfloat16 with float32 sums."""
    tokens, columns = named["num_tokens"], named["num_columns"]
    sums = named["sum_ptr"]
    return Cost("half", tokens * columns**2, bytes_of([named["inputs_ptr"], sums, sums]) * 0.75)


def _sweep(named: dict[str, Any]) -> Cost:
    """Columns that are solved one after another in registers, with float32's plain arithmetic."""
    rows, width, work = named["num_rows"], named["WIDTH"], named["work_ptr"]
    num_bytes = rows * width * (3 * work.element_size() + 1) + width * width * work.element_size()
    num_matrices = work.shape[:-2].numel()
    return Cost("sweep", 2.0 * num_matrices * rows * width * width, num_matrices * num_bytes)


def _head(named: dict[str, Any]) -> Cost:
    """The logits of both models read twice, and a gradient written; arithmetic hides behind it."""
    logits, teacher, grad = named["student_ptr"], named["teacher_ptr"], named["grad_ptr"]
    read = [logits, *([teacher] if named["HAS_TEACHER"] else [])]
    return Cost(num_bytes=2 * bytes_of(read) + bytes_of([grad]))


def _rows(named: dict[str, Any], floats: float, bools: int) -> Cost:
    """Rows that are gone through: so many reads and writes of all their floats, and of bools.

    Every one counts as if it were of memory, also where a cache holds the row.
    """
    matrix = named["first_ptr"] if "first_ptr" in named else named["direction_ptr"]
    return Cost(num_bytes=(4 * floats + bools) * matrix.numel())


def _admm_start(named: dict[str, Any]) -> Cost:
    """Read: B and its mask. Written: a direction; and where asked for again, in half precision."""
    return _rows(named, 2 + 1.5 * named["IS_HALF"], 1)


def _admm_step(named: dict[str, Any]) -> Cost:
    """Read: a direction and its image, three times. Written: a direction, as above."""
    return _rows(named, 3 * 2 + 1 + 1.5 * named["IS_HALF"], 0)


def _admm_turn(named: dict[str, Any]) -> Cost:
    """Read: the second direction and its image, then both of both, X, E and V. Written: X, E, V and
    a direction; in the last iteration, which needs no E and no image again, Z and its mask."""
    allowed = int(named["HAS_ALLOWED"])
    if named["IS_LAST"]:
        return _rows(named, 2 + 4 + 1, 1 + allowed)
    return _rows(named, 2 + 7 + 4 + 1.5 * named["IS_HALF"], allowed)


def _refit_start(named: dict[str, Any]) -> Cost:
    """Read: the gradient and the mask. Written: residual and direction."""
    return _rows(named, 3, 1)


def _refit_step(named: dict[str, Any]) -> Cost:
    """Read: direction and product, then both, residual, change and mask, then residual and
    direction. Written: residual, change and direction; in the last step the change alone."""
    changes = 2 - named["IS_FIRST"]
    if named["IS_LAST"]:
        return _rows(named, 2 + 1 + changes, 0)
    return _rows(named, 2 + 4 + changes + 3, 1)


def _refit_accept(named: dict[str, Any]) -> Cost:
    """Read: gradient, product and change, then change and weight. Written: the weight."""
    return _rows(named, 3 + 3, 0)


KERNELS: dict[str, Callable[[dict[str, Any]], Cost]] = {
    "_gram_kernel": _gram,
    "_sweep_block_kernel": _sweep,
    "_head_kernel": _head,
    "_admm_start_kernel": _admm_start,
    "_admm_step_kernel": _admm_step,
    "_admm_turn_kernel": _admm_turn,
    "_refit_start_kernel": _refit_start,
    "_refit_step_kernel": _refit_step,
    "_refit_accept_kernel": _refit_accept,
}
"""Kernel of Triton -> what one launch costs, from its arguments"""
