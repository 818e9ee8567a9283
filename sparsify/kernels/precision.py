"""In which precision a GPU multiplies float32 matrices, while a piece of code runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

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
