"""What each stage can be told; one dataclass a stage, gathered in conf/schema.py.

The string under a field is its help text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from conf import checks as rules
from conf.checks import nearest_multiples
from sparsify.errors import InputError

if TYPE_CHECKING:
    pass


def budget_syntax(field: str, text: str | None) -> None:
    """Require size:S or latency:S with 0 < S < 1, or nothing."""
    if text is None:
        return
    kind, _, share = text.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if kind not in ("size", "latency") or not 0 < value < 1:
        raise InputError(
            f"{field}={text}: use size:S or latency:S with a share S between 0 and 1, such as "
            "size:0.7, or null"
        )


def pattern_syntax(field: str, text: str) -> None:
    """Require N:M with 1 <= N < M, or unstructured:S with 0 < S < 1."""
    form = "use N:M such as 2:4, 4:8 or 1:2, or unstructured:0.5 (share of zeros)"
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if not 1 <= n < m:
            raise InputError(
                f"{field}={text}: N:M keeps N of every M weights, so 1 <= N < M; {form}"
            )
        return
    if match := re.fullmatch(r"unstructured:(\d*\.?\d+)", text):
        if not 0 < float(match[1]) < 1:
            raise InputError(f"{field}={text}: the share of zeros must be between 0 and 1; {form}")
        return
    raise InputError(f"{field}={text}: not a pattern; {form}")


def block_fits_pattern(block_size: int, pattern: str) -> None:
    """Require whole N:M groups in every block of columns."""
    if pattern.startswith("unstructured"):
        return
    m = int(pattern.split(":")[1])
    if block_size % m:
        raise InputError(
            f"prune.block_size={block_size}: must be a multiple of {m}, the group length of "
            f"prune.pattern={pattern}; use {nearest_multiples(block_size, m)}"
        )


@dataclass
class PruneConfig:
    """One-shot pruning."""

    method: str = "twofour"
    """method whose result goes on to recovery: one file of sparsify/methods"""
    baselines: list[str] = field(default_factory=lambda: ["magnitude", "wanda", "sparsegpt"])
    """other methods to run and report beside it; [] for none"""
    pattern: str = "2:4"
    """N:M keeps N of every M consecutive weights of a row; or unstructured:SHARE OF ZEROS"""
    num_samples: int = 128
    """calibration rows (of data.sequence_length tokens)"""
    damping: float = 0.01
    """share of the Hessian's mean diagonal added to its diagonal; over 0, at most 1"""
    block_size: int = 128
    """columns per lazy update, a multiple of M; with N:M it changes speed only"""
    batch_size: int = 8
    """calibration rows per forward on one worker; changes memory and speed only"""
    skip: list[str] = field(default_factory=list)
    """glob patterns of linear layers left dense, such as [*.down_proj]"""
    order: str = "auto"
    """when inputs are measured: layer (each behind the pruned layers before it in the block), block
    (all of a block at once, as SparseGPT's authors do), dense (as if nothing was pruned: one pass,
    no method with a teacher), or auto, as is best for the method"""
    existing: str = "ignore"
    """zeros that the model has: ignore, extend (they stay, others join them) or keep (the mask)"""
    teacher_share: float = 1.0
    """how far layers are fitted to the dense model's outputs on its own inputs; 0 to 1"""
    residual_share: float = 1.0
    """how far layers make up for errors of the residual stream they add to; 0 to 1"""
    refit_iterations: int = 10
    """steps of the conjugate gradients that re-solve the kept weights; 0 for none"""
    descent_sweeps: int = 3
    """sweeps of the descent over groups of columns; 0 for none"""
    admm_iterations: int = 10
    """iterations of method admm"""
    fisher: bool = False
    """count calibration tokens by how strongly predictions depend on them (one backward pass)"""
    rotation_steps: int | None = None
    """steps of the search for rotations to fold into the weights first; 0 for none; null: 30 with
    method=twofour, where the model allows it and its files have at most 32 GB"""
    budget: str | None = None
    """size:S or latency:S: leave layers dense up to the share S of the dense cost; null for none"""
    reduction: str = "fast"
    """order of sums over workers: fast, or fixed (same bits with 1, 2, 4 or 8 workers)"""
    activations: str = "auto"
    """where hidden states wait between blocks: auto, device, host or disk"""
    overlap: bool = False
    """while layers are solved, have the dense model pass the next block (methods with a teacher;
    prune.order=dense) and Hessians factored (orders block and dense): the same bits for more memory
    and, on a CPU, more cores"""
    checkpoint_every_blocks: int = 1
    """blocks between two states that a killed run can go on from"""

    def __post_init__(self) -> None:
        rules.one_of("prune.method", self.method, rules.method_names())
        for name in self.baselines:
            rules.one_of("prune.baselines", name, rules.method_names())
        rules.no_duplicates("prune.baselines", self.baselines)
        pattern_syntax("prune.pattern", self.pattern)
        for name in ("num_samples", "block_size", "batch_size", "checkpoint_every_blocks"):
            rules.in_range(f"prune.{name}", getattr(self, name), low=1)
        for name in ("refit_iterations", "descent_sweeps", "admm_iterations"):
            rules.in_range(f"prune.{name}", getattr(self, name), low=0)
        if self.rotation_steps is not None:
            rules.in_range("prune.rotation_steps", self.rotation_steps, low=0)
        for name in ("teacher_share", "residual_share"):
            rules.in_range(f"prune.{name}", getattr(self, name), low=0, high=1)
        budget_syntax("prune.budget", self.budget)
        rules.one_of("prune.order", self.order, ("auto", "layer", "block", "dense"))
        rules.one_of("prune.existing", self.existing, ("ignore", "extend", "keep"))
        if self.rotation_steps and self.existing != "ignore":
            raise InputError(
                f"prune.rotation_steps={self.rotation_steps}: rotations fill the zeros that "
                f"prune.existing={self.existing} is about; use prune.existing=ignore, or "
                "prune.rotation_steps=0"
            )
        rules.one_of("prune.reduction", self.reduction, ("fast", "fixed"))
        rules.one_of("prune.activations", self.activations, ("auto", "device", "host", "disk"))
        if self.overlap and self.activations in ("host", "disk"):
            raise InputError(
                f"prune.overlap=true with prune.activations={self.activations}: what the dense "
                "model does ahead is kept on the device; use prune.activations=device, or "
                "prune.overlap=false"
            )
        rules.in_range("prune.damping", self.damping, above=0, high=1)
        block_fits_pattern(self.block_size, self.pattern)
