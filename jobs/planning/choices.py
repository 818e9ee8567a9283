"""What fits a card, and the cheapest of it, as the overrides to type."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobs.planning.layouts import Machine, with_options
from sparsify.costs.layout import Recompute, Training
from sparsify.costs.memory import MemoryUse, training_memory
from sparsify.costs.seconds import Rates, step_seconds, total
from sparsify.costs.shapes import ModelShape

PLACEMENTS = ("replicated", "node", "sharded")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
KINDS: tuple[Recompute, ...] = ("whole", "elementwise")
_OPTIONS = ("zero_stage", "teacher_placement", "recompute_share", "recompute", "micro_batch_size")


@dataclass(frozen=True)
class Choice:
    """One way to lay a recovery out."""

    options: dict[str, Any]
    """of `distill`, what differs from the run as it was asked for"""
    memory: MemoryUse
    step_s: float

    def overrides(self) -> list[str]:
        """As words of a command line."""
        return [f"distill.{name}={_text(value)}" for name, value in self.options.items()]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def offload_seconds(num_parameters: float) -> float:
    """Of an update by the CPU of so many parameters of one worker, transfers among it.

    16 bytes of each at 9 GB/s: what is left of DeepSpeed's published step with offloading (2,740
    tokens/s, docs/plan.md) without its arithmetic, a single figure.
    """
    return 16.0 * num_parameters / 9e9


@dataclass(frozen=True)
class Recovery:
    """A recovery whose layout is to be chosen."""

    student: ModelShape
    teacher: ModelShape | None
    setup: Training
    """as it was asked for"""
    machine: Machine
    rates: Rates

    def choice(self, **options: Any) -> Choice:
        """One with some options changed."""
        setup = with_options(self.setup, options)
        memory = training_memory(self.student, self.teacher, setup)
        seconds = total(step_seconds(self.student, self.teacher, setup, self.rates))
        if setup.offload_optimizer:  # masters cross to the host and back, and a CPU updates them
            seconds += offload_seconds(self.student.num_parameters / setup.world_size)
        differs = {k: v for k, v in options.items() if getattr(self.setup, k) != v}
        return Choice(differs, memory, seconds)

    def fits(self, choice: Choice) -> bool:
        """Whether a worker has room for it."""
        return choice.memory.total <= self.machine.memory_bytes

    def every(self) -> Iterator[Choice]:
        """What can be chosen without changing a result but by rounding."""
        stages = [1, 2, 3] if self.setup.element_bytes == 2 else [0, 1, 2, 3]
        is_split = self.setup.world_size > 1 and self.setup.teacher_bytes != 1
        places = PLACEMENTS if is_split and self.teacher is not None else PLACEMENTS[:1]
        shares = sorted({*SHARES, self.setup.recompute_share})
        rows = self.setup.micro_batch_size * self.setup.num_micro_batches
        sizes = [size for size in (1, 2, 4, 8, 16, 32) if rows % size == 0]
        for values in itertools.product(stages, places, shares, KINDS, sizes):
            options = dict(zip(_OPTIONS, values, strict=True))
            if options["recompute_share"] or options["recompute"] == self.setup.recompute:
                yield self.choice(**options)

    def cheapest(self) -> Choice | None:
        """The fastest that fits, of equals the one that changes least; None if nothing does.

        Masters and moments in host memory are a last resort: they cost more time than all else.
        """
        asked = self.choice()
        fitting = [c for c in (asked, *self.every()) if self.fits(c)]
        if not fitting:
            stages, shares = [1, 2, 3], (0.5, 1.0)
            fitting = [
                choice
                for stage, share, kind in itertools.product(stages, shares, KINDS)
                if self.fits(choice := self.choice(
                    zero_stage=stage, recompute_share=share, recompute=kind, micro_batch_size=1,
                    teacher_placement="sharded" if self.setup.world_size > 1 else "replicated",
                    offload_optimizer=True,
                ))
            ]  # fmt: skip
        if not fitting:
            return None
        best = min(choice.step_s for choice in fitting)
        near = [choice for choice in fitting if choice.step_s <= 1.01 * best]
        return min(near, key=lambda choice: (len(choice.options), choice.step_s))
