"""How a recovery and a pruning are laid out on workers: what costs are counted for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Placement = Literal["replicated", "node", "sharded"]
Recompute = Literal["whole", "elementwise"]


@dataclass(frozen=True)
class Training:
    """How a recovery is laid out; names as the options of `distill`."""

    world_size: int = 1
    gpus_per_node: int = 1
    """workers among which a teacher of placement `node` is split"""
    zero_stage: int = 2
    element_bytes: int = 2
    """of weights and activations: 2 in bf16, 4 in fp32"""
    micro_batch_size: int = 1
    """rows per worker per forward"""
    sequence_length: int = 2048
    """tokens of a row"""
    num_micro_batches: int = 1
    """micro-batches of a worker in a step"""
    recompute_share: float = 0.0
    recompute: Recompute = "whole"
    compile: bool = False
    offload_optimizer: bool = False
    hpz_size: int = 1
    """workers that share a second copy of the weights under ZeRO-3; 1: none"""
    teacher_placement: Placement = "replicated"
    teacher_bytes: int | None = None
    """of a weight of the teacher; None: as `element_bytes`"""
    square_head: bool = False
    """whether the hidden states after all blocks of both models are kept"""
    uses_kl: bool = True
    """whether the teacher's logits are made"""
    uses_gpu: bool = True
    has_head_kernel: bool = True
    """on a GPU, whether the losses over the vocabulary are one kernel; False: other software"""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.sequence_length


@dataclass(frozen=True)
class Pruning:
    """How a pruning is laid out; names as the options of `prune`."""

    method: str = "twofour"
    order: str = "layer"
    """layer, block or dense"""
    needs_hessian: bool = True
    needs_factor: bool = True
    needs_teacher: bool = True
    num_samples: int = 128
    sequence_length: int = 2048
    batch_size: int = 8
    """rows per forward"""
    world_size: int = 1
    element_bytes: int = 2
    rotation_steps: int = 0
    on_device: bool = True
    """whether hidden states wait beside the weights; else forwards begin anew for every group"""
    uses_gpu: bool = True
    has_search_kernels: bool = True
    """whether the search for a mask has kernels for the pattern, on a GPU"""

    @property
    def tokens(self) -> float:
        """Calibration tokens of one worker."""
        return self.num_samples * self.sequence_length / self.world_size
