"""A GPU that computes nothing: code runs on tensors without data, and every operation is counted.

What runs is the library's code as it is, on tensors of torch's FakeTensorMode that say they are on
a GPU: the same kernels are chosen, the same launches made, the same values waited for. Each
launch moves two clocks, one of the host and one of the device, by a card's rates; a wait brings the
host to where the device is. Answers that depend on values are those of sound data: what is checked
holds, nothing is missing, and a number is 1.

The kernels of Triton are not run; `kernel_costs` says what each of them computes.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, masking_utils

from jobs.benchmarks.support import kernel_costs
from jobs.benchmarks.support.kernel_costs import KERNELS, varlen_cost
from jobs.benchmarks.support.op_costs import Cost, bytes_of, cost_of, tensors_of
from jobs.benchmarks.support.stand_in_guard import accelerator_told
from sparsify.calibration import block, groups
from sparsify.costs.seconds import Rates
from sparsify.errors import TwofourError
from sparsify.kernels import _sweep_triton
from sparsify.kernels.triton_jit import require_triton, triton
from sparsify.masks import storage
from sparsify.models import experts
from sparsify.models.unfuse import unfuse_experts

DEVICE = "cuda:0"


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

    @property
    def bound(self) -> str:
        """What binds most of it, and its share."""
        bounds = {key[2:]: value for key, value in self.items() if key.startswith("s:")}
        if not bounds or not self.get("s"):
            return ""
        name = max(bounds, key=bounds.__getitem__)
        return f"{name} {bounds[name] / self['s']:.0%}"


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
        self._phase = ""
        self.phases: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        """phase -> what was spent in it; no phase: an empty name"""
        self.lengths: Sequence[int] = ()
        """tokens of the documents of a batch, for attention by document"""
        self.is_paused = False
        """whether nothing is counted"""
        self.kernels: dict[str, tuple[int, float]] = {}
        """name of an operation or kernel -> how often it was launched, and seconds of the device"""

    def now(self) -> Spent:
        """What was spent until the device is done with what it was given."""
        self.wait(is_asked=False)
        return Spent({**self._spent, "s": self._device_s})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is launched meanwhile, or waited for by the device, is spent in this phase."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is counted meanwhile."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def launch(self, name: str, cost: Cost) -> None:
        """One kernel, or one copy: the host starts it, and the device runs it when it can."""
        if self.is_paused:
            return
        self._spend("launches", 1)
        self._host_s += self._rates.launch_s
        if self._host_s > self._device_s:  # it had nothing to do meanwhile
            self._advance(self._host_s - self._device_s, "launches")
        seconds, bound = cost.seconds(self._rates)
        self._advance(seconds, bound)
        times, before_s = self.kernels.get(name, (0, 0.0))
        self.kernels[name] = times + 1, before_s + seconds
        self._spend(f"operations:{cost.kind}", cost.operations)
        self._spend("bytes", cost.num_bytes)
        self._spend("link bytes", cost.link_bytes)

    def _advance(self, seconds: float, bound: str) -> None:
        """The device is busy, or idle, for so long."""
        self._device_s += seconds
        self._spend(f"s:{bound}", seconds)
        self.phases[self._phase]["s"] += seconds

    def _spend(self, key: str, amount: float) -> None:
        self._spent[key] += amount
        self.phases[self._phase][key] += amount

    def exchange(
        self, name: str, num_bytes: float, rate: float | None = None
    ) -> Callable[[], None]:
        """Start to send bytes over the links to the other GPUs, after the work so far.

        Args:
            name: of what is done.
            num_bytes: that this GPU sends.
            rate: bytes/s; None: of the links inside a machine.

        Returns:
            What makes the device wait for them; work may be done before.
        """
        seconds = num_bytes / (rate or self._rates.link)
        self._host_s += self._rates.launch_s
        self._links_s = max(self._links_s, self._device_s, self._host_s) + seconds
        end_s = self._links_s
        self._spend("launches", 1)
        self._spend("exchanged bytes", num_bytes)
        times, before_s = self.kernels.get(name, (0, 0.0))
        self.kernels[name] = times + 1, before_s + seconds

        def finish() -> None:
            if end_s > self._device_s:
                self._advance(end_s - self._device_s, "links")

        return finish

    def wait(self, is_asked: bool = True) -> None:
        """The host waits until the device is done."""
        if self._host_s > self._device_s:
            self._advance(self._host_s - self._device_s, "launches")
        self._host_s = self._device_s
        if is_asked:
            self._spend("waits", 1)

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
            self.launch(name, self.cost(name, args, kwargs, made or _written(func, args)))
            if name in ("_to_copy", "copy_") and not all(t.is_cuda for t in (*given, *made)):
                is_pinned = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
                if not is_pinned:
                    self.wait()
        return out

    def cost(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
        """`cost_of`, of attention by document too."""
        if name.startswith("_varlen_attn"):
            return varlen_cost(name, args, out, self.lengths)
        return cost_of(name, args, kwargs, out)

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

    def token_counts(self, index_TK: Tensor, num_experts: int) -> list[int]:
        """In the place of `experts.token_counts`: as if the router sent as many to every expert."""
        self.launch("bincount", Cost(num_bytes=bytes_of([index_TK])))
        self.wait()
        return experts.even_counts(index_TK.numel(), num_experts)

    def run_triton(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In the place of a launch of Triton."""
        name = kernel.fn.__name__
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        cost = KERNELS.get(name)
        if cost is None:
            raise TwofourError(
                f"roofline: kernel {name} is not known; add what it computes to KERNELS of "
                f"{kernel_costs.__name__}"
            )
        self.launch(name, cost(named))


def _written(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """What an operation that returns nothing changes."""
    return tensors_of(
        [
            value
            for one, value in zip(func._schema.arguments, args, strict=False)
            if one.alias_info is not None and one.alias_info.is_write
        ]
    )


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
    gpu, fake = StandInGpu(rates), FakeTensorMode(allow_non_fake_inputs=True)

    work = groups._HeldForward._work

    def work_in_modes(held: groups._HeldForward) -> None:
        """Modes are a thread's own, and held forwards have threads."""
        with fake, gpu:
            work(held)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        gpu.run_triton(kernel, args, kwargs)

    with ExitStack() as stack:
        stack.enter_context(accelerator_told())
        for owner, name, value in (
            (torch.cuda, "_exchange_device", lambda _: -1),
            (torch.cuda, "_maybe_exchange_device", lambda _: -1),
            (torch.cuda, "set_device", lambda _: None),
            (groups._HeldForward, "_work", work_in_modes),
            (nn.functional, "scaled_dot_product_attention", gpu.attention),
            (triton.runtime.jit.JITFunction, "run", run),
            (experts, "token_counts", gpu.token_counts),
            (_sweep_triton, "_MAX_GRAPH_ELEMENTS", 0),  # counted launch by launch
            (masking_utils, "is_tracing", lambda *_: False),  # else masks are made that are not
            (block, "require_causal", lambda *_: None),
            (block, "require_isolation", lambda *_: None),
            (storage, "_bits_of_bytes", storage._bits_of_bytes.__wrapped__),  # none is kept
            (FakeTensor, "numpy", _numpy),
            (FakeTensor, "tolist", _tolist),
            (FakeTensor, "data_ptr", lambda tensor: id(tensor)),  # else all are at one
            (FakeTensor, "__deepcopy__", _copied),
        ):
            stack.enter_context(patch.object(owner, name, value, create=owner is FakeTensor))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(fake)
        stack.enter_context(gpu)
        yield gpu


def empty_model(config: PretrainedConfig) -> Any:
    """A bfloat16 model on the meta device, its experts linear layers, for `without_data`; made
    outside of the stand-in."""
    with torch.device("meta"):
        # A model may set its own attention in its config.
        model: Any = AutoModelForCausalLM.from_config(deepcopy(config))
        model.to(torch.bfloat16)
    unfuse_experts(model)
    return model


def without_data(model: Any) -> None:
    """Give a model, or another module, of the meta device parameters on the stand-in; called inside
    of it."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            made = torch.empty(weight.shape, dtype=weight.dtype, device=DEVICE)
            module.register_parameter(name, nn.Parameter(made, requires_grad=False))
        if hasattr(module, "rotary_emb"):  # has buffers, which are made of the config
            module.rotary_emb = type(module.rotary_emb)(config=module.config).to(DEVICE)


def _tolist(tensor: Tensor, tolist: Callable[[Any], Any] = FakeTensor.tolist) -> Any:
    """One copy and one wait, where torch's own asks for every number."""
    return tolist(tensor.cpu())


def _numpy(tensor: Tensor) -> Any:
    return np.zeros(tensor.shape, dtype=str(tensor.dtype).removeprefix("torch."))


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """torch's own copies the bytes of a storage, and there are none."""
    made = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, tensor.requires_grad)
    memo[id(tensor)] = made
    return made
