"""Triton where it is installed. It comes with torch on a GPU machine; CPU builds lack it.

Modules with kernels take `jit`, `triton` and `tl` from here and can then be imported anywhere.
Their launchers call `require_triton` first.
"""

from __future__ import annotations

from typing import Any

from sparsify.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # said by `require_triton`, to those who need it
    triton = tl = None

__all__ = ["jit", "require_triton", "tl", "triton"]


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`, or without Triton the function as it is, which nothing can then launch."""
    if function is None:
        return lambda given: jit(given, **options)
    return function if triton is None else triton.jit(function, **options)


def require_triton() -> None:
    """Refuse to work without Triton.

    Raises:
        InputError: it is not installed.
    """
    if triton is None:
        raise InputError(
            "tensors on a GPU need Triton, which is not installed; install the CUDA build of "
            "torch, which brings the version that fits"
        )
