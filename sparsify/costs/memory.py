"""Memory of a recovery and of a pruning on one worker, by component.

What is counted is what this project's code and DeepSpeed 0.19 hold, tensor by tensor, at the
fullest moment: at the end of a forward pass, when all activations are there, or at the end of a
step, when the gradients have been copied together. ZeRO's partition is Rajbhandari et al. 2020
(arXiv 1910.02054, section 5): masters, moments and gradients of P weights take 4, 8 and 4 bytes a
weight, from stage 1, 1 and 2 on divided by the workers, the weights themselves from stage 3 on.
Activations are traced (`shapes.read_shape`), and recomputed blocks keep their inputs alone (Chen et
al. 2016, arXiv 1604.06174), or those and what products and attention put out.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.costs.layout import Pruning, Training
from sparsify.costs.shapes import ModelShape, kept_bytes
from sparsify.models.experts import STACK_BYTES

CHUNK_TOKENS = 1024  # as sparsify.data.rows has it; its logits exist at one time

_BUCKET = 200_000_000  # elements: jobs/training/zero.py

_LIVE = 1_000_000_000  # elements that ZeRO-3 may hold gathered, in the same file

# Buffers of chunk x vocabulary, float32, of `distillation.head_loss`, by whether a teacher has
# logits too: those, and on a GPU as large ones to work in. A CPU works in blocks of its caches.
_CHUNK_BUFFERS_GPU, _CHUNK_BUFFERS_CPU = {True: 5, False: 2}, {True: 2, False: 1}

_RUNTIME_GPU = 2.5e9  # CUDA's context, its libraries' workspaces, and NCCL's channels

# Code of libraries that is read when it first runs, and what it holds beside tensors: a recovery's
# process less what it held after its imports and its tensors. 90 to 110 MB in bf16 and fp32, for
# models of 16 to 32 M parameters.
_RUNTIME_CPU = 0.1e9

# Blocks of a size that later tensors do not fit in: of what is allocated and freed while training.
_FRAGMENTS_GPU = 0.05


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by component at the fullest moment."""

    parts: dict[str, float]
    """component -> bytes, in the order in which they are shown"""
    moment: str
    """when that is"""
    host: float = 0.0
    """bytes of the worker in host memory beside that, offloaded states"""

    @property
    def total(self) -> float:
        """All components."""
        return sum(self.parts.values())


def training_memory(student: ModelShape, teacher: ModelShape | None, setup: Training) -> MemoryUse:
    """What one worker of a recovery holds on its device.

    Args:
        student: the model that is trained.
        teacher: the dense model; None where a cache stands for it.
        setup: how they are laid out.

    Raises:
        InputError: see `shapes.kept_bytes`.
    """
    width, tokens = setup.element_bytes, setup.tokens
    kept, again = kept_bytes(student, width, setup.recompute_share, setup.compile, setup.recompute)
    standing = _standing(student, teacher, setup)
    gradients = _gradients(student, setup)
    head = _head(student, teacher, setup)
    largest = _largest(student, width)
    moments = {
        "teacher's forward pass": {
            "gradients": gradients["kept"], "teacher": _gathered(teacher, setup),
            "activations": 4.0 * tokens * student.widest * width,
        },
        "end of the forward pass": {
            "gradients": gradients["kept"], "activations": tokens * kept, "logits chunk": head,
        },
        "backward pass of the first block": {
            "gradients": gradients["kept"], "activations": tokens * (kept + again),
            "logits chunk": 4.0 * student.head_parameters, "buffers": 2 * largest,
        },
        "end of the backward pass": {
            "gradients": gradients["made"], "buffers": gradients["bucket"] + largest,
        },
        "update": {"gradients": gradients["update"]},
    }  # fmt: skip
    name = max(moments, key=lambda name: sum(moments[name].values()))
    parts = standing | {"gradients": 0.0, "activations": 0.0, "logits chunk": 0.0}
    for part, size in moments[name].items():
        parts[part] = parts.get(part, 0.0) + size
    if setup.uses_gpu:
        # The bucket's memory stays with the allocator between two backward passes.
        parts["buffers"] += max(0.0, gradients["bucket"] - moments[name].get("buffers", 0.0))
        moving = parts["activations"] + parts["logits chunk"] + parts["buffers"]
        parts["runtime"] = _RUNTIME_GPU + _FRAGMENTS_GPU * moving
    else:
        parts["runtime"] = _RUNTIME_CPU
    host = 12.0 * student.num_parameters / setup.world_size if setup.offload_optimizer else 0.0
    return MemoryUse(parts, name, host)


def _standing(student: ModelShape, teacher: ModelShape | None, setup: Training) -> dict[str, float]:
    """What is there all the time."""
    stage, world, width = setup.zero_stage, setup.world_size, setup.element_bytes
    count = student.num_parameters
    own = count / world
    weights = width * (own if stage == 3 else count)
    if stage == 3:
        weights += width * count / setup.hpz_size if setup.hpz_size > 1 else 0.0
    is_here = not setup.offload_optimizer
    bits = student.linear_parameters / 8
    gathered = width * min(float(count), float(_LIVE)) if stage == 3 else 0.0
    return {
        "student": weights,
        "teacher": 0.0 if teacher is None else _teacher(teacher, setup),
        "masters": 4.0 * own if stage and is_here else 0.0,
        "moments": 8.0 * (own if stage else count) if is_here else 0.0,
        "masks": bits * (2 + (1 / world if stage else 1)),
        "buffers": gathered,
    }


def _teacher(teacher: ModelShape, setup: Training) -> float:
    """A teacher's weights here, between its forward passes."""
    width = setup.teacher_bytes or setup.element_bytes
    if setup.teacher_placement == "replicated" or setup.world_size == 1:
        linear = teacher.linear_parameters if width == 1 else 0  # the rest stays in half precision
        return width * linear + max(width, 2) * (teacher.num_parameters - linear)
    parts = setup.gpus_per_node if setup.teacher_placement == "node" else setup.world_size
    return width * (teacher.blocks_parameters / parts + teacher.outside_parameters)


def _gathered(teacher: ModelShape | None, setup: Training) -> float:
    """What a teacher that is split holds while it computes: a block, and the next one."""
    if teacher is None or setup.teacher_placement == "replicated" or setup.world_size == 1:
        return 0.0
    return 2.0 * (setup.teacher_bytes or setup.element_bytes) * teacher.block_parameters


def _gradients(student: ModelShape, setup: Training) -> dict[str, float]:
    """Bytes of gradients: kept between micro-batches, all made, and at the update; and the buffers
    in which they are summed over the workers, DeepSpeed's and the copy that is sent.
    """
    stage, world, width = setup.zero_stage, setup.world_size, setup.element_bytes
    whole = 4.0 * student.num_parameters
    own, again = whole / world, setup.num_micro_batches > 1
    bucket = float(min(student.num_parameters, _BUCKET) * width)
    copies = 1 if world == 1 else 2
    # On a GPU one bucket is filled while another is sent; gloo makes a copy of what it scatters.
    copies += stage < 3 if setup.uses_gpu else stage == 3 and world > 1
    found = {"kept": own * again, "made": own * (1 + again), "update": 2 * own,
             "bucket": copies * bucket}  # fmt: skip
    if stage == 0:
        return {"kept": whole * again, "made": whole, "update": whole, "bucket": whole}
    if stage == 1 and width == 4:
        return found | {"kept": whole * again, "made": max(whole - bucket, own)}
    if stage == 1:
        # In half precision DeepSpeed adds up in one float32 buffer for all weights.
        return found | {"kept": whole, "made": whole, "update": whole}
    if stage == 3:
        step = min(own, 4.0 * _LIVE)  # the part of the masters that is updated at a time
        return found | {"kept": own, "made": own + step, "update": own + step}
    return found


def _head(student: ModelShape, teacher: ModelShape | None, setup: Training) -> float:
    """What the loss holds: buffers of a chunk, the head's gradient, hidden states."""
    tokens = min(setup.tokens, CHUNK_TOKENS)
    buffers = _CHUNK_BUFFERS_GPU if setup.uses_gpu else _CHUNK_BUFFERS_CPU
    has_teacher = teacher is not None and setup.uses_kl
    logits = 4.0 * buffers[has_teacher] * tokens * student.vocab_size
    states = 3.0 * setup.tokens * student.hidden_size * setup.element_bytes
    if setup.square_head and teacher is not None:
        states += (
            setup.element_bytes
            * setup.tokens
            * (teacher.num_blocks * teacher.hidden_size + student.num_blocks * student.hidden_size)
        )
    # On a CPU half precision is multiplied as float32: a copy of each head.
    copies = 0.0
    if not setup.uses_gpu and setup.element_bytes == 2:
        copies = 4.0 * student.head_parameters * (2 if teacher is not None else 1)
    return logits + states + copies + 4.0 * student.head_parameters


def _largest(student: ModelShape, width: int) -> float:
    """The largest gradient when it is made."""
    linear = max((rows * columns for rows, columns in student.layers), default=0)
    return float(width * max(linear, student.head_parameters, student.embedding_parameters))


def pruning_memory(shape: ModelShape, setup: Pruning) -> MemoryUse:
    """What one worker of a pruning holds on its device, for one method's walk.

    Args:
        shape: of the dense model.
        setup: how the pruning is laid out.
    """
    width = setup.element_bytes
    states = setup.tokens * shape.hidden_size * width * (2 if setup.needs_teacher else 1)
    batch = setup.batch_size * setup.sequence_length
    largest: float = max(rows * columns for rows, columns in shape.layers)
    if shape.has_experts and setup.uses_gpu:  # which are solved as stacks
        stacks = [g.num * rows * columns for g in shape.groups for rows, columns in g.layers]
        largest = max(largest, min(max(stacks), STACK_BYTES / 4))
    solved = _SOLVER_COPIES.get(setup.method, 5) * largest
    if setup.method == "gptq":
        solved += _GPTQ_SQUARES * _largest_square(shape, setup)
    held = 0.0
    if setup.on_device and setup.order == "layer" and not shape.has_experts:
        # Paused forwards: the widest activation, and the residual streams of both models.
        streams = 3 if setup.needs_teacher else 1
        held = setup.tokens * width * (shape.widest + streams * shape.hidden_size)
    # The next block is read into host memory meanwhile, which on a CPU is the same.
    copies = 1 if setup.uses_gpu else 2
    if setup.needs_teacher and not setup.on_device:
        copies += 1
    parts = {
        "block": float(copies * width * shape.block_parameters),
        "embedding": float(width * shape.embedding_parameters),
        "Hessians": _hessians(shape, setup),
        "waiting activations": (states if setup.on_device else 0.0) + held,
        "forward of a batch": 4.0 * batch * shape.widest * width,
        "solver": 4.0 * solved,
    }
    moment = "a block's last group"
    turned = {
        "whole model, rotated": float(width * shape.num_parameters), "solver": 12.0 * largest,
    }  # fmt: skip
    if setup.rotation_steps and sum(turned.values()) > sum(parts.values()):
        parts, moment = turned, "the search for rotations"
    if setup.uses_gpu:
        parts["runtime"] = _RUNTIME_GPU + _FRAGMENTS_GPU * sum(parts.values())
    return MemoryUse(parts, moment, 0.0 if setup.on_device else states)


def whole_memory(shape: ModelShape, num_models: int, width: int, tokens: int) -> MemoryUse:
    """What scoring holds: whole models, and one forward with all its logits.

    Args:
        shape: of the models.
        num_models: 2 where a model is compared with the dense one.
        width: bytes of a weight.
        tokens: of a forward.
    """
    parts = {
        "whole models": float(num_models * width * shape.num_parameters),
        "forward of a batch": 4.0 * tokens * shape.widest * width,
        "logits": 4.0 * num_models * tokens * shape.vocab_size,
        "runtime": _RUNTIME_GPU,
    }
    return MemoryUse(parts, "a batch's logits")


_SOLVER_COPIES = {
    "magnitude": 2, "wanda": 3, "sparsegpt": 5, "twofour": 10, "admm": 9, "gptq": 6,
}  # fmt: skip

# Of the Hessian, beside its mean and its factor: in the order of columns, and what the teacher's
# inputs differ by.
_GPTQ_SQUARES = 2


def _largest_square(shape: ModelShape, setup: Pruning) -> float:
    """I^2 of the widest Hessian, or on a GPU of the largest stack of experts' Hessians."""
    largest: float = max(group.num_inputs**2 for group in shape.groups)
    if shape.has_experts and setup.uses_gpu:
        stack = max(group.num * group.num_inputs**2 for group in shape.groups)
        largest = max(largest, min(stack, STACK_BYTES / 4))
    return largest


def _hessians(shape: ModelShape, setup: Pruning) -> float:
    """Sums of products of the groups that are measured together, their means, and one factor."""
    if not setup.needs_hessian:
        return 0.0
    element = 4.0 if setup.uses_gpu else 8.0  # of a sum; means and factors are float32
    sizes: list[tuple[int, int]] = []
    for group in shape.groups:
        inputs = group.num_inputs
        pair = min(group.num_outputs, inputs) * inputs if setup.needs_teacher else 0
        sizes += group.num * [(inputs**2, pair)]
    factor = 6.0 * _largest_square(shape, setup) if setup.needs_factor else 0.0
    together = sizes if shape.has_experts or setup.order != "layer" else [max(sizes)]
    return factor + sum((element + 4.0) * (square + pair) for square, pair in together)
