"""The two sides of the step's benchmark: a recovery of a random model, and its arithmetic alone."""

from __future__ import annotations

import copy
import importlib.util
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cluster.stages import StagedClusterSpec
from conf.options.data import DataConfig
from conf.options.distill import DistillConfig
from conf.schema import Config
from jobs.benchmarks.data import write_random_store
from jobs.benchmarks.sides.plain_engine import PlainEngine
from jobs.benchmarks.support.random_llama import llama_config, random_model
from jobs.benchmarks.support.stopwatch import Stopwatch
from jobs.training import optimizer
from jobs.training.build import build_recovery
from jobs.training.engine import build_engine
from jobs.training.loop import Recovery
from jobs.training.pace import Pace
from jobs.training.student import make_student, prove
from jobs.training.teacher import make_teacher
from sparsify.data.rows import TokenRows
from sparsify.data.store import ID_TYPES, id_type
from sparsify.errors import InputError
from sparsify.models.blocks import BlocksInMemory
from sparsify.models.calls import run_model
from sparsify.models.masked import apply_masks_, infer_masks
from sparsify.models.training import compile_layers, prepare_student, recompute_layers
from sparsify.models.varlen_check import choose_attention
from sparsify.pattern import Pattern

PHASES = (
    "data", "teacher", "student forward", "head loss", "backward", "gradient masks",
    "engine around it", "optimizer", "guard", "exchange",
)  # fmt: skip
"""phases of a step, in the order in which they are shown"""


class Here:
    """This process, as a recovery sees a worker of a cluster: the only one.

    Args:
        device: cpu or cuda.
        num_threads: CPU threads.
    """

    name, rank, world_size, local_world_size = "distill", 0, 1, 1

    def __init__(self, device: str, num_threads: int) -> None:
        self.device, self.num_threads = device, num_threads
        self.on_step: Callable[[dict[str, Any]], None] = lambda values: None
        """called with the tracker's figures after every step"""

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Nothing: the benchmark prints its own lines."""

    def metrics(self, values: dict[str, Any], step: int | None = None) -> None:
        """The step is over."""
        if f"{self.name}/loss" in values:
            self.on_step(values)

    def warn(self, message: str) -> None:
        """Print it."""
        print(f"warning: {message}", flush=True)

    def say(self, message: str) -> None:
        """Nothing: what is no warning is no news here."""

    alert = warn

    def is_draining(self) -> bool:
        """Whether the node is being taken away: there is none."""
        return False


@dataclass
class Sides:
    """What is compared."""

    recovery: Recovery
    """as `jobs.distill` makes it"""
    context: Here
    plain: Callable[[], None] | None
    """the models' own forwards and the student's backward, over the rows of one step"""
    watch: Stopwatch
    """on the phases of the recovery's step and of `plain`; off"""


def build(options: Namespace, folder: Path, num_steps: int, num_threads: int) -> Sides:
    """A recovery of a random, magnitude-pruned Llama that has not started, and its arithmetic.

    Args:
        options: of the command.
        folder: empty; the rows and the ledger go there.
        num_steps: steps of the whole run.
        num_threads: CPU threads.

    Raises:
        InputError: settings that do not go together.
    """
    device = options.device
    config = make_config(options, num_steps)
    settings, isolate = config.distill, config.data.isolate_documents
    context: Any = Here(device, num_threads)
    shape = llama_config(options.shape, options.layers, options.sequence_length, options.vocabulary)
    dense: Any = random_model(shape, options.seed, torch.float32, device)
    pruned = copy.deepcopy(dense)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    pattern = Pattern.parse("2:4")
    masks = infer_masks(pruned, pattern, may_be_dense=True)
    apply_masks_(pruned, masks)
    prepare_student(pruned)
    isolate = config.data.isolate_documents
    plain = copy.deepcopy(pruned).to(dtype) if options.baseline else None
    if plain is not None:
        prove(BlocksInMemory(plain), settings, isolate, context)  # attends as the student does
        recompute_layers(plain, settings.recompute_share, settings.recompute)
        in_half = settings.precision == "bf16"
        choose_attention(plain, settings.attention, isolate, in_half, context.warn)
        if settings.compile:
            compile_layers(plain)
    store = _store(options, folder / "rows", num_steps)
    student = make_student(BlocksInMemory(pruned), masks, pattern, config, context)
    dense_blocks = BlocksInMemory(dense.to(dtype))
    teacher = make_teacher(dense_blocks, settings, context, store.rows([0]), isolate)
    scratch = folder / "scratch"
    scratch.mkdir()
    recovery = build_recovery(
        context, config, student, teacher, store, None,
        Pace(context, settings, scratch, options.sequence_length), scratch, folder,
        lambda model, _, __, is_gpu: _engine(model, options, settings, is_gpu),
    )  # fmt: skip
    watch = Stopwatch(device)
    _watch_recovery(watch, recovery, recovery.engine.module)
    step = None
    if plain is not None:
        rows = recovery.batches.micro_batches(recovery.batches.at(0), device)
        step = _arithmetic(watch, plain, dense, rows)
    return Sides(recovery, context, step, watch)


def make_config(options: Namespace, num_steps: int) -> Config:
    """The configuration of the run: defaults but for the sizes, and no checkpoint on the way."""
    length = options.sequence_length
    return Config(
        cluster=StagedClusterSpec(num_workers=1),
        data=DataConfig(sequence_length=length, isolate_documents=not options.whole_rows),
        distill=DistillConfig(
            num_tokens=num_steps * options.batch_size * length, batch_size=options.batch_size,
            micro_batch_size=options.micro_batch_size, precision=options.precision,
            zero_stage=2 if options.zero_stage is None else options.zero_stage,
            compile=options.compile, recompute_share=options.recompute_share,
            recompute=options.recompute,
            teacher_dtype=options.teacher_dtype, attention=options.attention,
            checkpoint_every_steps=num_steps + 1, hang_after_s=3600.0, learning_rate=1e-5,
        ),
    )  # fmt: skip


@contextmanager
def process_group(device: str, folder: Path) -> Iterator[None]:
    """A group of this process alone, as checkpoints and DeepSpeed ask for one."""
    where = f"file://{(folder / 'group').absolute()}"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=where, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def require_engine(name: str) -> None:
    """Check that DeepSpeed is there if it is asked for.

    Raises:
        InputError: it is not.
    """
    try:
        is_there = importlib.util.find_spec(name) is not None if name == "deepspeed" else True
    except ImportError:
        is_there = False
    if not is_there:
        raise InputError(
            "--engine deepspeed: DeepSpeed is not installed here; install it, or use --engine "
            "plain, which is AdamW without it"
        )


def _engine(model: nn.Module, options: Namespace, settings: Any, is_gpu: bool) -> Any:
    """DeepSpeed's engine, or AdamW alone."""
    if options.engine == "plain":
        return PlainEngine(model, settings, is_gpu)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    return build_engine(model, settings, 1, is_gpu)


def _store(options: Namespace, folder: Path, num_steps: int) -> Any:
    length = options.sequence_length
    row_bytes = length * ID_TYPES[id_type(options.vocabulary)][1].itemsize + -(-length // 8)
    num_rows = max(64, num_steps * options.batch_size)
    gigabytes = (num_rows + 0.5) * row_bytes / 1e9
    return write_random_store(folder, gigabytes, length, options.vocabulary, options.seed)


def _watch_recovery(watch: Stopwatch, recovery: Any, student: Any) -> None:
    """Time the parts of a recovery's step."""
    engine = recovery.engine
    watch.watch(recovery.batches, "at", "data")
    watch.watch(recovery.batches, "micro_batches", "data")
    watch.watch(recovery, "_teacher", "teacher")
    watch.watch(student, "forward", "student forward")
    watch.watch(student.loss_head, "forward", "head loss")
    watch.watch(engine, "backward", "backward")
    watch.watch(engine, "step", "engine around it")
    watch.watch(optimizer.base_optimizer(engine), "step", "optimizer")
    watch.watch(recovery._guard, "check", "guard")
    watch.watch(recovery._guard, "mask_gradients", "gradient masks")
    watch.watch(recovery, "_exchange", "exchange")
    for param in student.parameters():
        hooks = param._backward_hooks or {}
        for key, hook in hooks.items():
            hooks[key] = watch.around(hook, "gradient masks")


def _arithmetic(
    watch: Stopwatch, student: Any, teacher: Any, parts: list[TokenRows]
) -> Callable[[], None]:
    """What no recovery can do without: the teacher's forward, the student's forward and backward.

    Both models make their logits, all at once and in their own type, as their own code does; no
    loss is computed: the gradient of the logits is the logits themselves, which costs nothing.
    """

    def teach(rows: TokenRows) -> None:
        with torch.no_grad():
            run_model(teacher, rows)

    def learn(logits: Any) -> None:
        logits.backward(logits.detach())

    teach = watch.around(teach, "alone: teacher")
    student_forward = watch.around(run_model, "alone: student forward")
    learn = watch.around(learn, "alone: backward")

    def step() -> None:
        for rows in parts:
            teach(rows)
            learn(student_forward(student, rows).logits)
        student.zero_grad(set_to_none=True)

    return step
