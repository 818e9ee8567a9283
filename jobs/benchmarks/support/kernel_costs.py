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


KERNELS: dict[str, Callable[[dict[str, Any]], Cost]] = {
    "_gram_kernel": _gram,
    "_sweep_block_kernel": _sweep,
    "_head_kernel": _head,
}
"""Kernel of Triton -> what one launch costs, from its arguments"""
