"""Is the training still sound? What to do with a bad step, and whether replicas still agree.

State machines without a clock: the loop tells them what it saw, they say what to do. Given the same
figures on every rank they decide alike on every rank, and their state is plain values that travel
in a checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify.errors import InputError

POLICIES = ("skip", "rollback", "stop")

Action = Literal["ok", "skip", "rollback", "stop"]

_MAD_TO_SIGMA = 1.4826  # of a normal distribution

# Of the median: a loss that hardly moves is no reason to call a ripple a spike.
_LEAST_SPREAD = 0.01

_CHECKSUM_PRIME = 0x9E3779B97F4A7C15 | 1  # odd, so that multiplying loses nothing modulo 2^63

_CHECKSUM_CHUNK = 2**24  # elements summed at a time: bounds the int64 copy that a CPU sum makes

_MODULUS = 2**63

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32, 16: torch.int32}


@dataclass
class SpikePolicy:
    """What counts as a bad step, and what follows from it."""

    policy: str = "rollback"
    """`skip`: leave out the update of a bad step, stop after too many in a row; `rollback`: go back
    to the last checkpoint after too many in a row; `stop`: stop at the first"""
    window: int = 128
    """good steps that a new one is compared with, at least 8"""
    min_steps: int = 20
    """good steps before anything but NaN and infinity is called bad, at least 8"""
    loss_threshold: float = 10.0
    """spreads (scaled median absolute deviations) above the median at which a loss is bad, > 0"""
    norm_threshold: float = 100.0
    """the same for the gradient norm, > 0; sound runs reached 29, and 2 in the loss"""
    max_in_row: int = 3
    """bad steps in a row that are only skipped, at least 0; the next one rolls back or stops"""
    max_rollbacks: int = 2
    """rollbacks of a whole run before it stops, at least 0"""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"spike policy {self.policy!r}: must be one of {', '.join(POLICIES)}")
        for name, low in (("window", 8), ("min_steps", 8), ("max_in_row", 0), ("max_rollbacks", 0)):
            if getattr(self, name) < low:
                raise InputError(f"spike {name}={getattr(self, name)}: must be at least {low}")
        for name in ("loss_threshold", "norm_threshold"):
            if not getattr(self, name) > 0:
                raise InputError(f"spike {name}={getattr(self, name)}: must be a number > 0")
        if self.min_steps > self.window:
            raise InputError(f"spike min_steps={self.min_steps}: at most window={self.window}")


@dataclass(frozen=True)
class Verdict:
    """What to do with a step whose gradients are there and whose update is not made yet."""

    action: Action
    reason: str = ""
    """what was wrong, for the log; empty for a good step"""


class SpikeGuard:
    """Judges every step by its loss and gradient norm, before the optimizer's step.

    A figure is bad if it is NaN or infinite, or lies so many spreads above the median of the last
    good steps. Only upwards, so a loss that falls fast is never bad. A bad step's update is left
    out: one odd batch costs one step. Bad steps in a row mean that the weights themselves are off,
    which skipping cannot mend: then the run goes back to its last checkpoint, and the steps that
    were bad are left out when they come again. Nothing bad enters the window.

    Use: `judge` each step; on "skip", drop the gradients; on "rollback", load the checkpoint and
    call `rolled_back` with the state that it holds; on "stop", end the run with the reason.
    """

    def __init__(self, policy: SpikePolicy) -> None:
        self.policy = policy
        self.num_skipped = 0
        self.num_rollbacks = 0
        self._losses: deque[float] = deque(maxlen=policy.window)
        self._norms: deque[float] = deque(maxlen=policy.window)
        self._num_in_row = 0
        self._bad_steps: set[int] = set()
        """steps whose batches a rollback has condemned"""

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Decide about a step.

        Args:
            step: its number; the same batch has the same number after a rollback.
            loss: over the whole global batch, the same on every rank.
            grad_norm: global, before clipping, the same on every rank.
        """
        if step in self._bad_steps:
            self.num_skipped += 1
            return Verdict("skip", f"step {step} was bad before the rollback")
        reason = self._fault("loss", loss, self._losses, self.policy.loss_threshold)
        reason = reason or self._fault(
            "gradient norm", grad_norm, self._norms, self.policy.norm_threshold
        )
        if reason is None:
            self._losses.append(loss)
            self._norms.append(grad_norm)
            self._num_in_row = 0
            return Verdict("ok")
        return self._bad(step, f"step {step}: {reason}")

    def _fault(self, name: str, value: float, window: deque[float], threshold: float) -> str | None:
        if not math.isfinite(value):
            return f"{name} is {value}"
        if len(window) < self.policy.min_steps:
            return None
        middle = statistics.median(window)
        spread = _MAD_TO_SIGMA * statistics.median(abs(x - middle) for x in window)
        spread = max(spread, _LEAST_SPREAD * abs(middle))
        if value <= middle + threshold * spread:
            return None
        return (
            f"{name} {value:.4g} is above {middle + threshold * spread:.4g}, {threshold:g} spreads "
            f"over the median {middle:.4g} of the last {len(window)} good steps"
        )

    def _bad(self, step: int, reason: str) -> Verdict:
        policy = self.policy
        if policy.policy == "stop":
            return Verdict("stop", reason)
        self._num_in_row += 1
        if self._num_in_row <= policy.max_in_row:
            self.num_skipped += 1
            self._bad_steps.add(step)
            return Verdict("skip", reason)
        row = f"{reason}; the {_ordinal(self._num_in_row)} bad step in a row"
        if policy.policy == "skip":
            return Verdict("stop", row)
        if self.num_rollbacks >= policy.max_rollbacks:
            return Verdict("stop", f"{row}, after {self.num_rollbacks} rollbacks")
        self._bad_steps.add(step)
        return Verdict("rollback", row)

    def rolled_back(self, state: dict[str, Any] | None) -> None:
        """Take up the window of the checkpoint that was loaded, and keep what was learnt since.

        Args:
            state: `state_dict` as it was when the checkpoint was made; None for the run's start.
        """
        skipped, rollbacks, bad_steps = self.num_skipped, self.num_rollbacks, self._bad_steps
        self.load_state_dict(state or SpikeGuard(self.policy).state_dict())
        self.num_skipped, self.num_rollbacks = skipped, rollbacks + 1
        self._bad_steps |= bad_steps
        self._num_in_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "num_in_row": self._num_in_row,
            "num_skipped": self.num_skipped,
            "num_rollbacks": self.num_rollbacks,
            "bad_steps": sorted(self._bad_steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; a smaller window than before keeps the latest steps."""
        self._losses = deque(state["losses"], maxlen=self.policy.window)
        self._norms = deque(state["norms"], maxlen=self.policy.window)
        self._num_in_row = state["num_in_row"]
        self.num_skipped = state["num_skipped"]
        self.num_rollbacks = state["num_rollbacks"]
        self._bad_steps = set(state["bad_steps"])


def _ordinal(number: int) -> str:
    tens, ones = divmod(number % 100, 10)
    return f"{number}{'th' if tens == 1 else {1: 'st', 2: 'nd', 3: 'rd'}.get(ones, 'th')}"


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number below 2^63 that tells replicas apart that should be equal to the bit.

    Per tensor, its bits read as integers (one, two or four bytes each) are summed modulo 2^64:
    exact, so neither the device nor the order of summation matters, and any one flipped bit changes
    it. The tensors' sums are chained with an odd factor, so their order counts. It is no hash:
    elements of one tensor may change places unnoticed, and two changes may cancel out.

    Args:
        tensors: any dtypes and devices, in an order that is the same on all ranks; one that is not
            contiguous is copied.

    Cost: one pass over the bytes, and one transfer per device at the end. On a CPU an int64 buffer
    of at most 128 MiB.
    """
    sums = [_bit_sum(tensor) for tensor in tensors]
    total = 0
    for value in _to_host(sums):
        total = (total * _CHECKSUM_PRIME + value) % _MODULUS
    return total


def _bit_sum(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().contiguous().flatten()
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHECKSUM_CHUNK):
        total += chunk.sum(dtype=torch.int64)
    return total


def _to_host(sums: list[Tensor]) -> list[int]:
    """The values of scalars of several devices, with one transfer from each."""
    found: dict[int, int] = {}
    for device in dict.fromkeys(value.device for value in sums):
        places = [i for i, value in enumerate(sums) if value.device == device]
        found.update(zip(places, torch.stack([sums[i] for i in places]).tolist(), strict=True))
    return [found[i] for i in range(len(sums))]
