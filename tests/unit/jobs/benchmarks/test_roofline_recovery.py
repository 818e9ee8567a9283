"""A step of recovery counted on a stand-in for a GPU: products, links and passes, by arithmetic."""

from __future__ import annotations

from argparse import Namespace
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jobs import bench
from jobs.benchmarks import roofline
from jobs.benchmarks.support.random_llama import llama_config, random_model
from jobs.benchmarks.support.recovery_counts import Counted, count_step, document_lengths
from jobs.benchmarks.support.roofline_recovery import products
from sparsify.costs.cards import find_card
from sparsify.costs.flops import distillation_flops
from sparsify.costs.seconds import rates_of
from sparsify.costs.shapes import ModelShape, kept_bytes, read_shape
from sparsify.data.rows import TokenRows
from sparsify.distillation.head_loss import Teacher
from sparsify.distillation.student import DistillStudent
from sparsify.errors import InputError
from sparsify.models.calls import run_model
from sparsify.models.lm_head import find_head
from sparsify.params import LossWeights

LENGTH, DOCUMENT, BLOCKS, VOCABULARY = 256, 100, 2, 512

CARD = find_card("h100", "")

CONFIG = llama_config("bench-512", BLOCKS, LENGTH, VOCABULARY)


@cache
def counted(
    *, compiled: bool, recompute_share: float, recompute: str = "whole", gpus: int = 1,
    parts: int = 1,
) -> Counted:  # fmt: skip
    options = Namespace(
        gpus=gpus, sequence_length=LENGTH, document_length=DOCUMENT, micro_batch_size=1,
        recompute_share=recompute_share, recompute=recompute, compile=compiled,
    )  # fmt: skip
    return count_step(CONFIG, options, CARD, rates_of(CARD, 2), parts)


@cache
def shape() -> ModelShape:
    return read_shape(CONFIG)


def test_a_row_is_cut_into_documents() -> None:
    assert document_lengths(256, 100) == [100, 100, 56]
    assert document_lengths(200, 100) == [100, 100]
    assert document_lengths(64, 100) == [64]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_counted_operations_are_those_of_the_formulas(compiled: bool, share: float) -> None:
    """Every product once forward and twice backward, attention 2.5 times; what runs again ends
    before its last product."""
    found = counted(compiled=compiled, recompute_share=share)
    flops, lengths = shape().flops, document_lengths(LENGTH, DOCUMENT)
    forward = flops.forward(lengths, with_head=False)
    linear = 2.0 * flops.num_block_weights * LENGTH
    head = 2.0 * flops.num_head_weights * LENGTH
    last = 2.0 * 512 * 1408 * LENGTH
    again = share * forward - share * BLOCKS * last
    expected = {
        "teacher": forward, "student forward": forward, "head loss": 4 * head,
        "backward": 2 * linear + 2.5 * (forward - linear) + again,
    }  # fmt: skip
    for phase, operations in expected.items():
        # bfloat16 products, and angles of positions in float32
        assert products(found.phases[phase]) == pytest.approx(operations, rel=1e-3), phase
    asked = distillation_flops(flops, flops, lengths)
    more = 0.5 * (forward - linear) + again
    assert products(found.step) == pytest.approx(asked + more, rel=2e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_elementwise_work_made_again_is_passes_over_memory_and_no_products(compiled: bool) -> None:
    """As many products as when all is kept; a compiled block reads and writes 1.4 bytes more for
    each that it does not keep, by the plan's figure for a block of 8B (here 1.56)."""
    kept = counted(compiled=compiled, recompute_share=0.0)
    found = counted(compiled=compiled, recompute_share=1.0, recompute="elementwise")
    assert products(found.step) == products(kept.step)
    more = found.phases["backward"]["bytes"] - kept.phases["backward"]["bytes"]
    freed = LENGTH * (
        kept_bytes(shape(), 2, 0.0, compiled)[0]
        - kept_bytes(shape(), 2, 1.0, compiled, "elementwise")[0]
    )
    if compiled:
        assert more == pytest.approx(1.4 * freed, rel=0.15)
    else:
        assert more > 1.4 * freed


def test_a_compiled_block_launches_less_and_moves_less() -> None:
    plain, fused = (counted(compiled=c, recompute_share=0.0) for c in (False, True))
    for phase in ("teacher", "student forward", "backward"):
        for key in ("launches", "bytes"):
            assert fused.phases[phase][key] < 0.8 * plain.phases[phase][key], (phase, key)


class _Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
        return func(*args, **(kwargs or {}))


def test_a_cpu_makes_as_many_products() -> None:
    student, teacher = (random_model(CONFIG, 0, torch.float32, "cpu") for _ in range(2))
    rows = TokenRows.whole(torch.zeros(1, LENGTH, dtype=torch.int64))
    wrapped, head = DistillStudent(student.train(), found=find_head(student)), find_head(teacher)
    with _Products() as seen:
        with torch.no_grad():
            hidden = run_model(head.base, rows).last_hidden_state
        loss, _ = wrapped(rows, LossWeights(kl=1.0), teacher=Teacher(hidden, head.plain()))
        loss.backward()
    kernels = counted(compiled=False, recompute_share=0.0).kernels
    assert seen.num == sum(kernels.get(name, (0, 0))[0] for name in ("mm", "addmm", "bmm"))


def test_what_each_gpu_sends_is_what_zero_and_a_split_teacher_send() -> None:
    """Gradients of two micro-batches around the ring, new weights once, blocks of the teacher."""
    found = counted(compiled=False, recompute_share=0.0, gpus=2, parts=2)
    weights, blocks = 2 * shape().num_parameters, 2 * shape().blocks_parameters
    sent = {name: spent.get("exchanged bytes", 0.0) for name, spent in found.phases.items()}
    assert sent["engine"] == pytest.approx(2 * 2 * weights / 2, rel=1e-3)
    assert sent["optimizer"] == pytest.approx(weights / 2, rel=1e-3)
    assert sent["teacher gathered"] == pytest.approx(2 * blocks / 2, rel=1e-3)


def test_micro_batches_add_up_and_the_update_does_not() -> None:
    one, three = (counted(compiled=False, recompute_share=0.0, parts=p) for p in (1, 3))
    for phase, times in (("teacher", 3), ("backward", 3), ("optimizer", 1), ("guard", 1)):
        bytes_of = [found.phases[phase]["bytes"] for found in (one, three)]
        assert bytes_of[1] == pytest.approx(times * bytes_of[0], rel=1e-6), phase


def test_adam_and_the_masks_touch_a_part_of_the_weights() -> None:
    """28 bytes of a weight are AdamW's alone; each GPU updates its part."""
    one = counted(compiled=False, recompute_share=0.0)
    two = counted(compiled=False, recompute_share=0.0, gpus=2, parts=2)
    whole = one.phases["optimizer"]["bytes"]
    assert whole > 28 * shape().num_parameters
    assert two.phases["optimizer"]["bytes"] == pytest.approx(whole / 2, rel=0.05)
    assert 0 < two.phases["gradient masks"]["bytes"] < one.phases["gradient masks"]["bytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "wanda"], "--method: means nothing to --stage recovery"),
        (["--step-rows", "7"], "--step-rows 7: not a multiple of 8"),
        (["--gpus", "12"], "whole machines of 8"),
        (["--recompute-share", "2"], "--recompute-share 2.0: 0 to 1"),
        (["--document-length", "0"], "--document-length 0: at least 1"),
        (["--vocabulary", "0"], "--vocabulary 0: at least 1"),
        (["--shape", "other"], "--shape other: use one of"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str], message: str) -> None:
    given = ["roofline", "--stage", "recovery", "--gpus", "8", *words]
    with pytest.raises(InputError, match=message):
        roofline.run(bench.parser().parse_args(given))


def test_options_of_recovery_are_refused_by_pruning() -> None:
    with pytest.raises(InputError, match="--step-rows: means nothing to --stage prune"):
        roofline.run(bench.parser().parse_args(["roofline", "--step-rows", "8"]))
