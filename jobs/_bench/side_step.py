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
from typing import TYPE_CHECKING, Any

from jobs._bench.stopwatch import Stopwatch
from sparsify.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from conf.schema import Config
    from jobs._recovery import Recovery
    from sparsify.text import TokenRows

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

    name, rank, world_size, local_world_size = "step", 0, 1, 1

    def __init__(self, device: str, num_threads: int) -> None:
        self.device, self.num_threads = device, num_threads
        self.on_step: Callable[[dict[str, Any]], None] = lambda values: None
        """called with the tracker's figures after every step"""

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Nothing: the benchmark prints its own lines."""

    def metrics(self, values: dict[str, Any], step: int | None = None) -> None:
        """The step is over."""
        if "distill/loss" in values:
            self.on_step(values)

    def warn(self, message: str) -> None:
        """Print it."""
        print(f"warning: {message}", flush=True)

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
    """A recovery of a random, magnitude-pruned Llama that has yet to begin, and its arithmetic.

    Args:
        options: of the command.
        folder: empty; the rows and the ledger go there.
        num_steps: steps of the whole run.
        num_threads: CPU threads.

    Raises:
        InputError: settings that do not go together.
    """
    import torch

    from jobs._batches import Batches
    from jobs._bench.random_llama import llama_config, random_model
    from jobs._engine import MaskGuard
    from jobs._pace import Pace
    from jobs._recovery import Recovery
    from jobs._teacher import place_teacher
    from sparsify.flops import count_flops
    from sparsify.masks import apply_masks_, mask_gradients
    from sparsify.models.head import DistillStudent, check_head
    from sparsify.models.training import compile_layers, prepare_student
    from sparsify.models.varlen import choose_attention

    device, is_gpu = options.device, options.device == "cuda"
    config = make_config(options, num_steps)
    settings = config.distill
    context: Any = Here(device, num_threads)
    shape = llama_config(options.shape, options.layers, options.sequence_length, options.vocabulary)
    teacher: Any = random_model(shape, options.seed, torch.float32, device)
    student = copy.deepcopy(teacher)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    teacher.requires_grad_(False).to(dtype)
    flops = count_flops(student), count_flops(teacher)
    store = _store(options, folder / "rows", num_steps)
    isolate = config.data.isolate_documents
    in_half = settings.precision == "bf16"
    choose_attention((student, teacher), settings.attention, isolate, in_half, context.warn)
    batches = Batches(store, settings, options.seed, 0, 1, isolate, flops)
    found = check_head(teacher)
    place_teacher(teacher, settings, context, batches.at(0).rows)
    masks = _magnitude_masks(student)
    apply_masks_(student, masks)
    prepare_student(student)
    plain = copy.deepcopy(student).to(dtype) if options.baseline else None
    for model in (student, plain):
        _recompute(model, settings.recompute_share)
    if settings.compile:
        for model in (student, teacher, plain):
            if model is not None:
                compile_layers(model)
    mask_gradients(student, masks)
    wrapped = DistillStudent(student)
    engine = _engine(wrapped, options, settings, is_gpu)
    guard = MaskGuard(engine, masks)
    guard.clear()
    scratch = folder / "scratch"
    scratch.mkdir()
    pace = Pace(context, settings, scratch, options.sequence_length)
    recovery = Recovery(
        context, config, engine, guard, found, None, masks, batches, None, pace, scratch, folder
    )
    watch = Stopwatch(device)
    _watch_recovery(watch, recovery, wrapped)
    step = None
    if plain is not None:
        first = batches.micro_batches(batches.at(0), device)
        step = _arithmetic(watch, plain, teacher, first)
    return Sides(recovery, context, step, watch)


def make_config(options: Namespace, num_steps: int) -> Config:
    """The configuration of the run: defaults but for the sizes, and no checkpoint on the way."""
    from cluster.spec import ClusterSpec
    from conf.schema import Config, DataConfig
    from conf.stages import DistillConfig

    length = options.sequence_length
    return Config(
        cluster=ClusterSpec(num_workers=1),
        data=DataConfig(sequence_length=length, isolate_documents=not options.whole_rows),
        distill=DistillConfig(
            num_tokens=num_steps * options.batch_size * length, batch_size=options.batch_size,
            micro_batch_size=options.micro_batch_size, precision=options.precision,
            zero_stage=2 if options.zero_stage is None else options.zero_stage,
            compile=options.compile, recompute_share=options.recompute_share,
            teacher_dtype=options.teacher_dtype, attention=options.attention,
            checkpoint_every_steps=num_steps + 1, hang_after_s=3600.0, learning_rate=1e-5,
        ),
    )  # fmt: skip


@contextmanager
def process_group(device: str, folder: Path) -> Iterator[None]:
    """A group of this process alone, as checkpoints and DeepSpeed ask for one."""
    import torch.distributed as dist

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
        from jobs._bench.plain_engine import PlainEngine

        return PlainEngine(model, settings, is_gpu)
    from jobs import _engine

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    return _engine.build_engine(model, settings, 1, is_gpu)


def _recompute(model: Any, share: float) -> None:
    from sparsify.models.training import recompute_layers

    if model is not None:
        recompute_layers(model, share)


def _store(options: Namespace, folder: Path, num_steps: int) -> Any:
    from jobs._bench.data import write_random_store
    from sparsify.store import ID_TYPES, id_type

    length = options.sequence_length
    row_bytes = length * ID_TYPES[id_type(options.vocabulary)][1].itemsize + -(-length // 8)
    num_rows = max(64, num_steps * options.batch_size)
    gigabytes = (num_rows + 0.5) * row_bytes / 1e9
    return write_random_store(folder, gigabytes, length, options.vocabulary, options.seed)


def _magnitude_masks(model: nn.Module) -> dict[str, Any]:
    """2:4 by size of every linear layer of the blocks."""
    from torch import nn

    from sparsify.models.structure import find_blocks
    from sparsify.pattern import Pattern, keep_mask_from_scores

    pattern = Pattern.parse("2:4")
    prefix, blocks = find_blocks(model)
    return {
        name: keep_mask_from_scores(module.weight.detach().abs(), pattern)
        for name, module in blocks.named_modules(prefix=prefix)
        if isinstance(module, nn.Linear)
    }


def _watch_recovery(watch: Stopwatch, recovery: Any, student: Any) -> None:
    """Time the parts of a recovery's step."""
    from jobs import _engine

    engine = recovery.engine
    watch.watch(recovery._batches, "at", "data")
    watch.watch(recovery._batches, "micro_batches", "data")
    watch.watch(recovery, "_teacher", "teacher")
    watch.watch(student, "forward", "student forward")
    watch.watch(student.loss_head, "forward", "head loss")
    watch.watch(engine, "backward", "backward")
    watch.watch(engine, "step", "engine around it")
    watch.watch(_engine.base_optimizer(engine), "step", "optimizer")
    watch.watch(recovery._guard, "check", "guard")
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
    import torch

    def forward(model: Any, rows: TokenRows) -> Any:
        output = model(input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False)
        return output.logits

    def teach(rows: TokenRows) -> None:
        with torch.no_grad():
            forward(teacher, rows)

    def learn(logits: Any) -> None:
        logits.backward(logits.detach())

    teach = watch.around(teach, "alone: teacher")
    student_forward = watch.around(forward, "alone: student forward")
    learn = watch.around(learn, "alone: backward")

    def step() -> None:
        for rows in parts:
            teach(rows)
            learn(student_forward(student, rows))
        student.zero_grad(set_to_none=True)

    return step
