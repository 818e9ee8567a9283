"""In which precision matrices of float32 are multiplied: all of it on a GPU, or halves of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_lock = threading.Lock()

_asked: list[bool] = []  # allow_tf32 of every piece of code that is running, in all threads

_put_back: list[Callable[[], None]] = []  # what brings back the setting outside of them all


@contextmanager
def float32_products(allow_tf32: bool = False) -> Iterator[None]:
    """Multiply float32 matrices on a GPU in full precision inside, whatever the setting outside.

    torch has one setting for all threads. It is put back when the last one leaves, and as long as
    any of them wants full precision all of them have it.

    Args:
        allow_tf32: True multiplies in TF32 instead, with 10 bits of mantissa in place of 23.
    """
    with _lock:
        if not _asked:
            _put_back.append(_remembered())
        _asked.append(allow_tf32)
        _set(all(_asked))
    try:
        yield
    finally:
        with _lock:
            _asked.remove(allow_tf32)
            if _asked:
                _set(all(_asked))
            else:
                _put_back.pop()()


def _older() -> str | None:
    """The setting of torch's older interface; None: set through the newer one alone, which torch
    forbids to mix."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _remembered() -> Callable[[], None]:
    """What brings the present setting back."""
    setting = torch.backends.cuda.matmul
    before, older = setting.fp32_precision, _older()

    def put_back() -> None:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        setting.fp32_precision = before

    return put_back


def _set(allow_tf32: bool) -> None:
    if _older() is None:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if allow_tf32 else "ieee"
    else:
        torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")


def add_product_(matrix_RC: Tensor, left_RI: Tensor, right_IC: Tensor, alpha: float = 1.0) -> None:
    """matrix += alpha left @ right in place, of matrices, or of stacks of them (E, R, C)."""
    if matrix_RC.ndim == 2:
        matrix_RC.addmm_(left_RI, right_IC, alpha=alpha)
    else:
        matrix_RC.baddbmm_(left_RI, right_IC, alpha=alpha)


def times(matrix_RC: Tensor, vector_C: Tensor) -> Tensor:
    """matrix @ vector, of one, or of each of a stack: (E, R, C) and (E, C)."""
    if vector_C.ndim == 1:
        return matrix_RC @ vector_C
    return (matrix_RC @ vector_C.unsqueeze(-1)).squeeze(-1)


def half_product(left_RI: Tensor, right_half_IC: Tensor) -> Tensor:
    """left @ right from numbers of 11 significant bits, as many as TF32 has, summed in float32.

    float16 has TF32's mantissa at twice its rate on tensor cores, and is a matter of the operands:
    TF32 is a setting of all threads, so that what runs beside would decide the bits.

    Args:
        left_RI: float32 or float64 (..., R, I), finite; every row is scaled to a largest value of
            1, which keeps it inside of float16. What is below 2^-24 of its row's largest counts
            as 0.
        right_half_IC: float16, of entries that fit into it.

    Returns:
        (R, C) in the dtype of `left_RI`. A CPU multiplies the same numbers as float32: their
        products are exact, so only the order of the sum differs from a GPU's.

    Cost: one product at the rate of half precision and four passes: the left
    matrix twice, its half and the result.
    """
    tiny = torch.finfo(left_RI.dtype).tiny
    largest_R1 = torch.linalg.vector_norm(left_RI, math.inf, -1, keepdim=True).clamp_(min=tiny)
    left_half_RI = torch.empty_like(left_RI, dtype=torch.float16)
    torch.div(left_RI, largest_R1, out=left_half_RI)
    return half_matmul(left_half_RI, right_half_IC).to(left_RI.dtype).mul_(largest_R1)


def half_matmul(left_RI: Tensor, right_IC: Tensor) -> Tensor:
    """left @ right of float16, summed in float32: (..., R, C), with the same batches on both."""
    if not left_RI.is_cuda:
        return left_RI.float() @ right_IC.float()
    multiply = torch.mm if left_RI.ndim == 2 else torch.bmm
    return multiply(left_RI, right_IC, out_dtype=torch.float32)
