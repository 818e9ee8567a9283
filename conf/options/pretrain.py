"""Options of jobs.pretrain: the small embedded model from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf import checks as rules
from conf.checks import nearest_multiples
from sparsify.errors import InputError

if TYPE_CHECKING:
    pass


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
class PretrainConfig:
    """Train the small embedded model from scratch (job pretrain, one process)."""

    out: str = "sparsify/embedded"
    """model folder to write"""
    data: str = "code"
    """code (standard library and packages), or a source as in data.calibration of jobs.prune"""
    vocab_size: int = 1024
    """tokens of the byte-level vocabulary; at least 257"""
    hidden_size: int = 128
    """width of the model"""
    intermediate_size: int = 256
    """width of the feed-forward part"""
    num_layers: int = 4
    """decoder blocks"""
    num_heads: int = 4
    """attention heads; divides hidden_size into heads of even width"""
    num_kv_heads: int = 2
    """key and value heads; divides num_heads"""
    sequence_length: int = 256
    """tokens per row, and the model's longest context; at least 8"""
    num_tokens: int = 44_040_192
    """tokens to train on"""
    stdlib_repeats: int = 3
    """times the standard library is used for each use of the installed packages (data=code)"""
    batch_size: int = 32
    """rows per step"""
    learning_rate: float = 3e-3
    """peak learning rate, after warm-up"""
    num_warmup_steps: int = 100
    """steps of linear warm-up"""
    weight_decay: float = 0.1
    """decoupled weight decay of matrices"""
    max_grad_norm: float = 1.0
    """gradient norm above which a step is scaled down"""
    bf16: bool = True
    """forward and backward in bfloat16, weights in float32"""
    device: str = "cpu"
    """cpu or cuda"""
    seed: int = 0
    """initial weights and order of the rows"""
    num_threads: int = 2
    """CPU threads"""

    def __post_init__(self) -> None:
        rules.not_blank("out", self.out)
        rules.not_blank("data", self.data)
        rules.one_of("device", self.device, ("cpu", "cuda"))
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "num_tokens", "stdlib_repeats", "batch_size", "num_threads"):
            rules.in_range(name, getattr(self, name), low=1)
        rules.in_range("vocab_size", self.vocab_size, low=257)
        rules.in_range("sequence_length", self.sequence_length, low=8)
        rules.in_range("seed", self.seed, low=0, high=2**63 - 1)
        for name in ("learning_rate", "max_grad_norm"):
            rules.in_range(name, getattr(self, name), above=0)
        for name in ("weight_decay", "num_warmup_steps"):
            rules.in_range(name, getattr(self, name), low=0)
        rules.one_step("num_tokens", self.num_tokens, self.batch_size, self.sequence_length)
        heads_fit(self.hidden_size, self.num_heads, self.num_kv_heads)
