"""A torch built for CPUs that is told of CUDA, so that tensors may say they are on a GPU."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from sparsify.errors import TwofourError

_GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CUDA, 0));
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct Hooks : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
extern "C" void exchange_hooks() {
  static void* other = *(void**)new Hooks();
  void*& own = *(void**)&at::detail::getCUDAHooks();
  void* before = own;
  own = other;
  other = before;
}
"""
"""Builds of torch for CPUs refuse to index what says it is on a GPU: they have nothing that makes
it the current one. The guard makes it by doing nothing.

Their autograd asks which accelerator there is, for the stream of what holds a gradient. Between two
calls of `exchange_hooks` it is told of CUDA, and has a stream of which nothing is asked."""


@contextmanager
def accelerator_told() -> Iterator[None]:
    """Operations and backward passes of tensors on "cuda" go through torch while this lasts.

    Raises:
        TwofourError: this torch has no CUDA, and no compiler is there to make up for it.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    guard, library = _guard(), torch.library.Library("aten", "IMPL")
    # A kernel of CUDA's keeps what has one from being taken apart in the backward pass.
    library.impl("silu_backward", _no_kernel, "CUDA")
    guard.exchange_hooks()
    try:
        # A thread for each device is started with the first backward pass of a process, or never.
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        guard.exchange_hooks()
        library._destroy()


def _no_kernel(*_: object) -> None:
    raise AssertionError("tensors without data reach no kernel")


@cache
def _guard() -> ctypes.CDLL:
    """`_GUARD`, compiled and loaded."""
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        words = ["c++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library),
                 f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10",
                 "-ltorch_cpu"]  # fmt: skip
        try:
            subprocess.run(words, check=True, capture_output=True, text=True)  # noqa: S603
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            raise TwofourError(
                f"roofline: this torch has no CUDA, and the stand-in for it could not be compiled "
                f"({said[-1] if said else error}); install a C++ compiler, such as Debian's g++"
            ) from None
        return ctypes.CDLL(str(library))
