"""Options of jobs.pretrain: the small embedded model from scratch."""

from __future__ import annotations

from dataclasses import dataclass

from conf.checks import Given, nearest_multiples, one_step
from sparsify.errors import InputError
from sparsify.params import PretrainParams, option


def heads_fit(hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
    """Require heads of equal, even width (rotary positions pair columns) and equal groups."""
    unit = 2 * num_heads
    if hidden_size % unit:
        raise InputError(
            f"hidden_size={hidden_size}: must be a multiple of {unit} = 2 x num_heads={num_heads}; "
            f"use {nearest_multiples(hidden_size, unit)}"
        )
    if num_heads % num_kv_heads:
        raise InputError(
            f"num_kv_heads={num_kv_heads}: must divide num_heads={num_heads}; use one of "
            + ", ".join(str(k) for k in range(1, num_heads + 1) if num_heads % k == 0)
        )


@dataclass
class PretrainConfig(PretrainParams):
    """Train the small embedded model from scratch (job pretrain, one process)."""

    out: str = "sparsify/embedded"
    """model folder to write"""
    data: str = "code"
    """code (standard library and packages), or a source as in data.calibration of jobs.prune"""
    vocab_size: int = option(1024, low=257)
    """tokens of the byte-level vocabulary; at least 257"""
    hidden_size: int = option(128, low=1)
    """width of the model"""
    intermediate_size: int = option(256, low=1)
    """width of the feed-forward part"""
    num_layers: int = option(4, low=1)
    """decoder blocks"""
    num_heads: int = option(4, low=1)
    """attention heads; divides hidden_size into heads of even width"""
    num_kv_heads: int = option(2, low=1)
    """key and value heads; divides num_heads"""
    sequence_length: int = option(256, low=8)
    """tokens per row, and the model's longest context; at least 8"""
    num_tokens: int = option(44_040_192, low=1)
    """tokens to train on"""
    stdlib_repeats: int = option(3, low=1)
    """times the standard library is used for each use of the installed packages (data=code)"""
    device: str = option("cpu", one_of=("cpu", "cuda"))
    """cpu or cuda"""
    seed: int = option(0, low=0, high=2**63 - 1)
    """initial weights and order of the rows"""
    num_threads: int = option(2, low=1)
    """CPU threads"""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("num_tokens", "batch_size", "sequence_length")
        one_step(*(Given.of(name, self) for name in names))
        heads_fit(self.hidden_size, self.num_heads, self.num_kv_heads)
