"""A GPU that computes nothing: code runs on tensors without data, and every operation is counted.

What runs is the library's code as it is, on tensors of torch's FakeTensorMode that say they are on
a GPU: the same kernels are chosen, the same launches made, the same values waited for. Each
launch moves two clocks, one of the host and one of the device, by a card's rates; a wait brings the
host to where the device is. Answers that depend on values are those of sound data: what is checked
holds, nothing is missing, and a number is 1.

The kernels of Triton are not run; `KERNELS` says what each of them computes.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from jobs.benchmarks.support.op_costs import Cost, bytes_of, cost_of, tensors_of
from sparsify.calibration import block, groups
from sparsify.costs.seconds import Rates
from sparsify.errors import TwofourError
from sparsify.kernels import _sweep_triton
from sparsify.kernels.triton_jit import require_triton, triton
from sparsify.masks import storage

DEVICE = "cuda:0"

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""
"""Builds of torch for CPUs refuse to index what says it is on a GPU: they have nothing that makes
it the current one. This makes it by doing nothing."""


class Spent(dict[str, float]):
    """Seconds ("s"), by what binds them ("s:..."), and counts; a clock's reading, or a difference.

    It adds and subtracts as a number does, so that `PhaseTimer` can be given it for a clock.
    """

    def __add__(self, other: Any) -> Spent:
        return self if other == 0 else Spent(_each(self, other, lambda a, b: a + b))

    __radd__ = __add__

    def __sub__(self, other: Spent) -> Spent:
        return Spent(_each(self, other, lambda a, b: a - b))

    def __truediv__(self, number: float) -> Spent:
        return Spent({key: value / number for key, value in self.items()})

    def __mul__(self, number: float) -> Spent:
        return Spent({key: value * number for key, value in self.items()})


def _each(
    first: dict[str, float], second: dict[str, float], join: Callable[[float, float], float]
) -> dict[str, float]:
    keys = dict.fromkeys([*first, *second])
    return {key: join(first.get(key, 0.0), second.get(key, 0.0)) for key in keys}


class StandInGpu(TorchDispatchMode):
    """Counts what is done; entered with `stand_in_gpu`.

    Args:
        rates: of the card.
    """

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self._rates = rates
        self._host_s = self._device_s = self._links_s = 0.0
        self._spent: dict[str, float] = defaultdict(float)
        self.kernels: dict[str, tuple[int, float]] = {}
        """name of an operation or kernel -> how often it was launched, and seconds of the device"""

    def now(self) -> Spent:
        """What was spent until the device is done with what it was given."""
        self.wait(is_asked=False)
        return Spent({**self._spent, "s": self._device_s})

    def launch(self, name: str, cost: Cost) -> None:
        """One kernel, or one copy: the host starts it, and the device runs it when it can."""
        self._spent["launches"] += 1
        self._host_s += self._rates.launch_s
        if self._host_s > self._device_s:  # it had nothing to do meanwhile
            self._spent["s:launches"] += self._host_s - self._device_s
            self._device_s = self._host_s
        seconds, bound = cost.seconds(self._rates)
        self._device_s += seconds
        times, before_s = self.kernels.get(name, (0, 0.0))
        self.kernels[name] = times + 1, before_s + seconds
        self._spent[f"s:{bound}"] += seconds
        self._spent[f"operations:{cost.kind}"] += cost.operations
        self._spent["bytes"] += cost.num_bytes
        self._spent["link bytes"] += cost.link_bytes

    def exchange(self, name: str, num_bytes: float) -> Callable[[], None]:
        """Start to send bytes over the links to the other GPUs, after the work so far.

        Returns:
            What makes the device wait for them; work may be done before.
        """
        seconds = num_bytes / self._rates.link
        self._host_s += self._rates.launch_s
        self._links_s = max(self._links_s, self._device_s, self._host_s) + seconds
        end_s = self._links_s
        self._spent["launches"] += 1
        self._spent["exchanged bytes"] += num_bytes
        times, before_s = self.kernels.get(name, (0, 0.0))
        self.kernels[name] = times + 1, before_s + seconds

        def finish() -> None:
            if end_s > self._device_s:
                self._spent["s:links"] += end_s - self._device_s
                self._device_s = end_s

        return finish

    def wait(self, is_asked: bool = True) -> None:
        """The host waits until the device is done."""
        self._host_s = self._device_s = max(self._host_s, self._device_s)
        if is_asked:
            self._spent["waits"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero"):
            return self._answer(name, args[0])
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # asks what a tensor is
            return out
        given, made = tensors_of(args, list(kwargs.values())), tensors_of(out)
        if name in ("any", "all"):
            made[0].stand_in = name == "all"  # type: ignore[attr-defined]
        elif name in ("isnan", "isinf", "logical_not", "bitwise_not"):
            made[0].stand_in = name.endswith("not")  # type: ignore[attr-defined]
        is_on_gpu = any(tensor.is_cuda for tensor in (*given, *made))
        if is_on_gpu and not _is_view(func) and name not in _FREE:
            self.launch(name, cost_of(name, args, kwargs, out))
            if name in ("_to_copy", "copy_") and not all(t.is_cuda for t in (*given, *made)):
                is_pinned = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
                if not is_pinned:
                    self.wait()
        return out

    def _answer(self, name: str, tensor: Tensor) -> Any:
        """What sound data would say."""
        if tensor.is_cuda:
            self.wait()
        if name == "nonzero":
            return tensor.new_empty((0, tensor.ndim), dtype=torch.int64)
        if name == "equal":
            return True
        if tensor.dtype == torch.bool:
            return getattr(tensor, "stand_in", False)
        return 1.0 if tensor.is_floating_point() else 0

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        """In the place of scaled_dot_product_attention: one kernel that keeps no scores.

        It is told to be causal, and then leaves half of the pairs out, or given a mask.
        """
        pairs = 4.0 * query.numel() * key.shape[-2] * (0.5 if is_causal else 1.0)
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        read = [query, key, value, out] + ([] if attn_mask is None else [attn_mask])
        self.launch("scaled_dot_product_attention", Cost("attention", pairs, bytes_of(read)))
        return out

    def run_triton(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In the place of a launch of Triton."""
        name = kernel.fn.__name__
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        cost = KERNELS.get(name)
        if cost is None:
            raise TwofourError(
                f"roofline: kernel {name} is not known; add what it computes to KERNELS of "
                f"{__name__}"
            )
        self.launch(name, cost(named))


def _is_view(func: Any) -> bool:
    """Whether an operation only looks at its input in another way."""
    returns = func._schema.returns
    return bool(returns) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returns
    )


_FREE = (
    "_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "is_pinned", "_pin_memory", "record_stream", "resize_",
)  # fmt: skip
"""They only make room, or say where things are."""


def _gram(named: dict[str, Any]) -> Cost:
    """Half of X^T X, in bfloat16 with float32 sums."""
    tokens, columns = named["num_tokens"], named["num_columns"]
    sums = named["sum_ptr"]
    return Cost("half", tokens * columns**2, bytes_of([named["inputs_ptr"], sums, sums]) * 0.75)


def _sweep(named: dict[str, Any]) -> Cost:
    """Columns that are solved one after another in registers, with float32's plain arithmetic."""
    rows, width = named["num_rows"], named["WIDTH"]
    item = named["work_ptr"].element_size()
    num_bytes = rows * width * (3 * item + 1) + width * width * item
    return Cost("sweep", 2.0 * rows * width * width, num_bytes)


KERNELS: dict[str, Callable[[dict[str, Any]], Cost]] = {
    "_gram_kernel": _gram,
    "_sweep_block_kernel": _sweep,
}
"""Kernel of Triton -> what one launch costs, from its arguments"""


@contextmanager
def stand_in_gpu(rates: Rates) -> Iterator[StandInGpu]:
    """Tensors on "cuda:0" have no data while this lasts, and what is done with them is counted.

    What is made inside has no data either, wherever it is. Checks that compare values are left out:
    that a model looks back alone, and that its documents stay apart.

    Raises:
        InputError: Triton is not installed.
        TwofourError: this torch has no CUDA, and no compiler is there to make up for it.

    Cost: some 0.1 ms an operation, whatever its size.
    """
    require_triton()
    if not torch.backends.cuda.is_built():
        _register_guard()
    gpu, fake = StandInGpu(rates), FakeTensorMode(allow_non_fake_inputs=True)

    work = groups._HeldForward._work

    def work_in_modes(held: groups._HeldForward) -> None:
        """Modes are a thread's own, and held forwards have threads."""
        with fake, gpu:
            work(held)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        gpu.run_triton(kernel, args, kwargs)

    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "_exchange_device", lambda _: -1),
            (torch.cuda, "_maybe_exchange_device", lambda _: -1),
            (torch.cuda, "set_device", lambda _: None),
            (groups._HeldForward, "_work", work_in_modes),
            (nn.functional, "scaled_dot_product_attention", gpu.attention),
            (triton.runtime.jit.JITFunction, "run", run),
            (_sweep_triton, "_MAX_GRAPH_ELEMENTS", 0),  # counted launch by launch
            (masking_utils, "is_tracing", lambda *_: False),  # else masks are made that are not
            (block, "require_causal", lambda *_: None),
            (block, "require_isolation", lambda *_: None),
            (storage, "_bits_of_bytes", storage._bits_of_bytes.__wrapped__),  # none is kept
            (FakeTensor, "numpy", _numpy),
            (FakeTensor, "__deepcopy__", _copied),
        ):
            stack.enter_context(patch.object(owner, name, value, create=owner is FakeTensor))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(fake)
        stack.enter_context(gpu)
        yield gpu


def _numpy(tensor: Tensor) -> Any:
    return np.zeros(tensor.shape, dtype=str(tensor.dtype).removeprefix("torch."))


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """torch's own copies the bytes of a storage, and there are none."""
    made = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, tensor.requires_grad)
    memo[id(tensor)] = made
    return made


def _register_guard() -> None:
    """Compile and load `_GUARD`, once a process."""
    if getattr(_register_guard, "is_done", False):
        return
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        words = ["c++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library),
                 f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10"]  # fmt: skip
        try:
            subprocess.run(words, check=True, capture_output=True, text=True)  # noqa: S603
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            raise TwofourError(
                f"roofline: this torch has no CUDA, and the stand-in for it could not be compiled "
                f"({said[-1] if said else error}); install a C++ compiler, such as Debian's g++"
            ) from None
        ctypes.CDLL(str(library))
    _register_guard.is_done = True  # type: ignore[attr-defined]
