"""torch.compile for a GPU that is not there: Inductor says what it fuses, and that is counted.

A block is traced as torch.compile traces it: one graph forward and one backward, between which the
min-cut partitioner decides what is kept. Inductor lowers both and groups their operations into
kernels, as for a Hopper; the kernels are not written. A call of the block launches
them on the stand-in. Dynamo is left out: what its guards take of the host is not counted.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, ir, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy

from jobs.benchmarks.support.op_costs import Cost, tensors_of
from jobs.benchmarks.support.stand_in_gpu import StandInGpu

_HOPPER = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=52428800, total_memory=84941471744, gcnArchName="",
)  # fmt: skip
"""what Inductor asks of a card before it fuses; the same for whichever is counted"""

_Launches = list[tuple[str, Cost]]


class _Compiled(Exception):
    """The code is there, and is not to be run yet."""


@contextmanager
def counted_compile(gpu: StandInGpu) -> Iterator[None]:
    """`nn.Module.compile` makes a module launch what Inductor would make of it, while this lasts.

    Args:
        gpu: the stand-in, entered.
    """
    codes: dict[Any, Callable[..., Any]] = {}

    def compile_module(module: nn.Module, *_: Any, **__: Any) -> None:
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return _run(module, plain, (args, kwargs), codes, gpu)

        module.forward = forward

    with ExitStack() as stack:
        for owner, name, value in (
            (nn.Module, "compile", compile_module),
            (CudaInterface, "get_device_properties", staticmethod(lambda *_: _HOPPER)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
            (torch.cuda, "get_device_properties", lambda *_: _HOPPER),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
            (scheduler, "has_triton", lambda *_: True),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


def _run(
    module: nn.Module, plain: Callable[..., Any], given: Any, codes: dict[Any, Any],
    gpu: StandInGpu,
) -> Any:  # fmt: skip
    """A call of a compiled module; modules of one class share code, as they do in torch."""
    params = dict(module.named_parameters())
    leaves, form = tree_flatten(given)
    tensors = [*params.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
    rest = tuple("tensor" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    runs_again = module.training and bool(getattr(module, "gradient_checkpointing", False))
    policy = _policy(module) if runs_again else None
    key = (type(module), torch.is_grad_enabled(), policy, rest, *map(_looks, tensors))
    if key not in codes:

        def call(*flat: Tensor) -> Any:
            rows = iter(flat[len(params) :])
            filled = [next(rows) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(filled, form)
            own = dict(zip(params, flat, strict=False))
            with ExitStack() as stack:
                stack.enter_context(_reparametrize_module(module, own))
                if runs_again:  # the partitioner sees to that
                    stack.enter_context(patch.object(module, "gradient_checkpointing", False))
                return plain(*args, **kwargs)

        compiler = _compiler(gpu)
        codes[key] = aot_function(
            call, compiler, compiler, partial(_partition, policy),
            decompositions=select_decomp_table(), inference_compiler=compiler,
        )  # fmt: skip
        with gpu.paused(), contextlib.suppress(_Compiled):
            codes[key](*tensors)
    return codes[key](*tensors)


_Policy = Callable[..., CheckpointPolicy]


def _policy(module: nn.Module) -> _Policy:
    """What a module that is recomputed asks torch to keep, each operation by itself."""
    func: Any = module._gradient_checkpointing_func
    contexts = func.keywords.get("context_fn")
    return _again if contexts is None else contexts.args[0]


def _again(*_: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _partition(
    policy: _Policy | None, joint: fx.GraphModule, inputs: Any, **more: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """What is kept between forward and backward; torch marks what a policy says of it."""
    if policy is not None:
        outputs: Any = joint.graph.output_node().args[0]
        reached: list[Any] = list(outputs[: more["num_fwd_outputs"]])
        for node in reached:
            if node is not None and "recompute" not in node.meta and node.op == "call_function":
                of = node.args[0] if node.target is operator.getitem else node
                node.meta["recompute"] = policy(None, of.target)
                node.meta["ac_graph_id"] = 0
                reached.extend(node.all_input_nodes)
    return min_cut_rematerialization_partition(joint, inputs, **more)


def _looks(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad


def _compiler(gpu: StandInGpu) -> Callable[..., Any]:
    """Makes of a graph what launches its kernels, and answers with tensors without data."""

    def compiler(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        fake = detect_fake_mode(inputs)
        assert fake is not None, "all tensors are without data"
        with _disable_current_modes(), V.set_fake_mode(fake), fake:
            launches = _launches(graph, inputs, gpu)
        order = {node: at for at, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
        outputs: Any = graph.graph.output_node().args[0]

        def run(given: list[Any]) -> list[Any]:
            if gpu.is_paused:
                raise _Compiled
            for name, cost in launches:
                gpu.launch(name, cost)
            made = []
            for node in outputs:
                if node in order:
                    made.append(given[order[node]])
                else:
                    made.append(None if node is None else _empty(node.meta["val"]))
            given.clear()
            return made

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return compiler


def _empty(like: Any) -> Any:
    if not isinstance(like, Tensor):
        return like
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _launches(graph: fx.GraphModule, inputs: Sequence[Tensor], gpu: StandInGpu) -> _Launches:
    """The kernels that Inductor makes of a graph, in their order."""
    compile_fx.view_to_reshape(graph)
    lowering = GraphLowering(graph, example_inputs=inputs)
    quiet = V.set_debug_handler(DebugContext())
    with quiet, V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
        lowering.run(*inputs)
        lowering.init_wrapper_code()
        lowering._update_scheduler()
        nodes = lowering.scheduler.nodes
        return [found for node in nodes if (found := _launch(node, gpu)) is not None]


def _launch(node: Any, gpu: StandInGpu) -> tuple[str, Cost] | None:
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return None
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        return "compiled", Cost(num_bytes=float(node.get_read_write_buffers_sizes()))
    made: Any = node.node
    if isinstance(made, ir.MultiOutput):  # one of the several results of a kernel
        return None
    target = getattr(made, "op_overload", None)
    origins = [one for one in made.origins if target in (None, one.target)]
    origin: Any = made.get_origin_node() or origins[-1]
    name = origin.target.overloadpacket.__name__
    args, kwargs = fx.map_arg((origin.args, dict(origin.kwargs)), lambda one: one.meta["val"])
    return name, gpu.cost(name, args, kwargs, tensors_of(origin.meta["val"]))
