"""In which precision a GPU multiplies float32 matrices, while a piece of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(allow_tf32: bool = False) -> Iterator[None]:
    """Multiply float32 matrices on a GPU in full precision inside, whatever the setting outside.

    Args:
        allow_tf32: True multiplies in TF32 instead, with 10 bits of mantissa in place of 23.
    """
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None  # set through the newer interface alone; torch forbids to mix the two
    try:
        if older is None:
            setting.fp32_precision = "tf32" if allow_tf32 else "ieee"
        else:
            torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        setting.fp32_precision = before
