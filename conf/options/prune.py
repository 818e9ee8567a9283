"""Options prune.*: one-shot pruning."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from conf.checks import METHODS, nearest_multiples
from sparsify.errors import InputError
from sparsify.params import PruneParams, option
from sparsify.pattern import MAX_GROUP


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
    """Require N:M with 1 <= N < M of at most MAX_GROUP, or unstructured:S with 0 < S < 1."""
    form = "use N:M such as 2:4, 4:8 or 1:2, or unstructured:0.5 (share of zeros)"
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if not 1 <= n < m:
            raise InputError(
                f"{field}={text}: N:M keeps N of every M weights, so 1 <= N < M; {form}"
            )
        if m > MAX_GROUP:
            raise InputError(f"{field}={text}: M must be at most {MAX_GROUP}; {form}")
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
            f"prune.pattern={pattern} with prune.block_size={block_size}: a block must hold whole "
            f"groups of {m}; use prune.block_size={nearest_multiples(block_size, m)}"
        )


@dataclass
class PruneConfig(PruneParams):
    """One-shot pruning."""

    method: str = option("twofour", one_of=METHODS)
    """method whose result goes on to recovery: one file of sparsify/methods"""
    baselines: list[str] = option(["magnitude", "wanda", "sparsegpt"], one_of=METHODS)
    """other methods to run and report beside it; [] for none"""
    pattern: str = "2:4"
    """N:M keeps N of every M consecutive weights of a row; or unstructured:SHARE OF ZEROS"""
    num_samples: int = option(128, low=1)
    """calibration rows (of data.sequence_length tokens)"""
    damping: float = option(PruneParams.damping, above=0, high=1)
    """share of the Hessian's mean diagonal added to its diagonal; over 0, at most 1"""
    batch_size: int = option(8, low=1, speed_only=True)
    """calibration rows per forward on one worker; changes memory and speed only"""
    attention: str = option("auto", one_of=("auto", "varlen", "masked"), speed_only=True)
    """over rows of several documents: varlen (within each document), masked (over the whole row) or
    auto: varlen where a GPU has a kernel for it and the model computes the same with it"""
    skip: list[str] = option([])
    """glob patterns of linear layers left dense, such as [*.down_proj]"""
    order: str = option("auto", one_of=("auto", "layer", "block", "dense"))
    """when inputs are measured: layer (each after the pruned layers before it in the block), block
    (all of a block at once, as SparseGPT's authors do), dense (as if nothing was pruned: one pass,
    no method with a teacher), or auto, as is best for the method"""
    existing: str = option("ignore", one_of=("ignore", "extend", "keep"))
    """zeros that the model has: ignore, extend (they stay, others join them) or keep (the mask)"""
    fisher: bool = False
    """count calibration tokens by how strongly predictions depend on them (one backward pass)"""
    rotation_steps: int | None = option(None, low=0)
    """steps of the search for rotations to fold into the weights first; 0 for none; null: 30 with
    method=twofour, where the model allows it and its files have at most 32 GB"""
    budget: str | None = None
    """size:S or latency:S: leave layers dense up to the share S of the dense cost; null for none"""
    reduction: str = option("fast", one_of=("fast", "fixed"))
    """order of sums over workers: fast, or fixed (same bits with 1, 2, 4 or 8 workers)"""
    activations: str = option("auto", one_of=("auto", "device", "host", "disk"), speed_only=True)
    """where hidden states wait between blocks: auto, device, host or disk"""
    overlap: bool = option(False, speed_only=True)
    """while layers are solved, have the dense model pass the next block (methods with a teacher;
    prune.order=dense) and Hessians factored (orders block and dense): the same bits for more memory
    and, on a CPU, more cores"""
    checkpoint_every_blocks: int = option(1, low=1, speed_only=True)
    """blocks between two states that a killed run can resume from"""

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern_syntax("prune.pattern", self.pattern)
        budget_syntax("prune.budget", self.budget)
        if self.rotation_steps and self.existing != "ignore":
            raise InputError(
                f"prune.rotation_steps={self.rotation_steps}: rotations fill the zeros that "
                f"prune.existing={self.existing} is about; use prune.existing=ignore, or "
                "prune.rotation_steps=0"
            )
        if self.overlap and self.activations in ("host", "disk"):
            raise InputError(
                f"prune.overlap=true with prune.activations={self.activations}: what the dense "
                "model does ahead is kept on the device; use prune.activations=device, or "
                "prune.overlap=false"
            )
        block_fits_pattern(self.block_size, self.pattern)
