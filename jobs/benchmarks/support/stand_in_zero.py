"""ZeRO-2 and a teacher split by FSDP as passes over the memory of a GPU that is not there.

DeepSpeed and FSDP are not run: they ask for a process group of all GPUs. What their code does to
the tensors of one of them is done here, operation by operation, and counted; what crosses links is
sent by a ring. Named beside each pass is what does it in DeepSpeed 0.19's `stage_1_and_2.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from conf.options.distill import DistillConfig
from jobs.benchmarks.support.stand_in_gpu import StandInGpu
from jobs.training.optimizer import GatedAdamW, is_matrix
from jobs.training.zero import BUCKET_ELEMENTS
from jobs.training.zero_state import MOMENTS


class _Slice:
    """What the guard asks of the link from a weight to the part of its copies that is here."""

    def __init__(self, start: int, copies: dict[str | None, Tensor], grad: Tensor) -> None:
        self.lp_fragment_address = SimpleNamespace(start=start)
        self._copies, self._grad = copies, grad

    def get_lp_grad_fragment(self, index: int) -> Tensor:
        """The part of the sum of the step's gradients."""
        return self._grad

    def get_hp_fragment(self, optim_state_key: str | None = None) -> Tensor:
        """The part of the master, or of a moment."""
        return self._copies[optim_state_key]


class StandInZero:
    """A student and its AdamW on one of several GPUs: ZeRO-2 in bf16, sums in float32.

    The GPU is the middle one, whose part is of weights that are pruned.

    Args:
        module: the student, in bfloat16 on the stand-in.
        config: of the recovery.
        gpu: where it is.
        world_size: number of GPUs.
        rate: bytes/s of a ring through all of them.
    """

    def __init__(
        self, module: nn.Module, config: DistillConfig, gpu: StandInGpu, world_size: int,
        rate: float,
    ) -> None:  # fmt: skip
        self.module, self._gpu, self._config = module, gpu, config
        self._world_size, self._rate = world_size, rate
        self._num_parts = config.batch_size // (config.micro_batch_size * world_size)
        self._num_done, self._filled = 0, 0
        self._waiting: Callable[[], None] = _nothing
        params = [param for param in module.parameters() if param.requires_grad]
        device = params[0].device
        self._bucket = torch.empty(BUCKET_ELEMENTS, dtype=torch.bfloat16, device=device)
        matrices = [param for param in params if is_matrix(param)]
        others = [param for param in params if not is_matrix(param)]
        self._groups = [self._partition(matrices), self._partition(others)]
        groups = [
            {"params": [group.master], "weight_decay": config.weight_decay * decays}
            for group, decays in zip(self._groups, (1, 0), strict=True)
        ]
        betas = config.beta1, config.beta2
        inner = GatedAdamW(groups, lr=config.learning_rate, betas=betas, eps=1e-8, fused=True)
        for group in self._groups:
            step = torch.zeros((), device=device)
            inner.state[group.master] = {"step": step, **group.moments}
        self.optimizer = SimpleNamespace(
            optimizer=inner, param_groups=inner.param_groups, _global_grad_norm=None
        )
        for param in params:
            param.register_post_accumulate_grad_hook(self._take)

    def _partition(self, params: list[nn.Parameter]) -> Any:
        """Masters, moments and sums of this GPU's part of some weights, one after another."""
        total = sum(param.numel() for param in params)
        size = -(-total // self._world_size)
        begin = self._world_size // 2 * size
        device = params[0].device
        master = nn.Parameter(torch.empty(size, device=device))
        moments = {name: torch.empty(size, device=device) for name in MOMENTS}
        sums = torch.empty(size, device=device)
        own, at = [], -begin  # of the part, where the weight begins
        for param in params:
            first, last = max(at, 0), min(at + param.numel(), size)
            part = slice(first, last)
            at += param.numel()
            param._hp_mapping = None  # type: ignore[attr-defined]
            if last <= first:
                continue
            copies: dict[str | None, Tensor] = {None: master.data[part]}
            copies.update((name, moment[part]) for name, moment in moments.items())
            found = _Slice(first - at + param.numel(), copies, sums[part])
            param._hp_mapping = found  # type: ignore[attr-defined]
            param._index_in_param_group = 0  # type: ignore[attr-defined]
            own.append(sums[part])
        whole = torch.empty(size * self._world_size, dtype=torch.bfloat16, device=device)
        return SimpleNamespace(master=master, moments=moments, sums=sums, own=own, whole=whole)

    def zero_optimization_stage(self) -> int:
        """2: gradients, masters and moments are split."""
        return 2

    def __call__(self, **inputs: Any) -> Any:
        """The student's forward."""
        return self.module(**inputs)

    def backward(self, loss: Tensor) -> None:
        """One micro-batch: gradients are taken as they come, the last ones in the end."""
        (loss / self._num_parts).backward()
        with self._gpu.phase("engine"):
            self._reduce(self._bucket[: self._filled])
            self._filled = 0
            self._waiting()
            self._waiting = _nothing
        self._num_done += 1

    def _take(self, param: Tensor) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`: into the bucket, unless too large."""
        grad = param.grad
        assert grad is not None, "called when it was made"
        with self._gpu.phase("engine"), torch.no_grad():
            if self._filled + grad.numel() > BUCKET_ELEMENTS:
                self._reduce(self._bucket[: self._filled])
                self._filled = 0
            if grad.numel() > BUCKET_ELEMENTS:
                self._reduce(grad.view(-1))
            else:
                self._bucket[self._filled : self._filled + grad.numel()].copy_(grad.view(-1))
                self._filled += grad.numel()
        param.grad = None

    @torch.no_grad()
    def _reduce(self, bucket: Tensor) -> None:
        """`average_tensor`, after the bucket before: divided, flattened, summed, the own part
        added up in float32 and copied back."""
        if not bucket.numel():
            return
        self._waiting()
        bucket.div_(self._world_size)
        flat = torch.cat([bucket])  # of several parts: one copy
        self._waiting = self._exchange("all_reduce", 2 * _num_bytes(flat))
        own = flat[: max(1, flat.numel() // self._world_size)]
        torch.empty_like(own, dtype=torch.float32).add_(own.to(torch.float32))
        bucket[: len(own)].copy_(own)

    def _exchange(self, name: str, num_bytes: float) -> Callable[[], None]:
        """Around a ring of all GPUs: each passes on all but its own part."""
        if self._world_size == 1:
            return _nothing
        share = (self._world_size - 1) / self._world_size
        return self._gpu.exchange(name, share * num_bytes, self._rate)

    @torch.no_grad()
    def step(self) -> None:
        """At the end of a batch, `step`: overflow, norm, clipping, AdamW, weights gathered."""
        if self._num_done < self._num_parts:
            return
        self._num_done = 0
        own = [part for group in self._groups for part in group.own]
        self._look_for_overflow(own)
        norms = torch.stack([torch.linalg.vector_norm(part) for part in own])
        total = norms.pow(2).sum()
        self._exchange("all_reduce", 2 * _num_bytes(total))()
        self.optimizer._global_grad_norm = total.sqrt()
        self._gpu.wait()  # is_invalid_grad_norm
        clip = torch.clamp(total + 1e-6, min=1.0)
        for group in self._groups:
            group.master.grad = group.sums
            group.sums.mul_(1.0 / clip)
        self.optimizer.optimizer.step()
        for group in self._groups:
            group.master.grad = None
            part = group.whole[: len(group.master)]
            part.copy_(group.master)
            self._exchange("all_gather", _num_bytes(group.whole))()
            group.sums.zero_()

    def _look_for_overflow(self, parts: list[Tensor]) -> None:
        """`has_overflow_partitioned_grads_serial`, and all GPUs asked."""
        count = torch.zeros(1, device=parts[0].device)
        for part in parts:
            sound = part.amax().isfinite().logical_and(part.amin().isfinite())
            count += sound.logical_not()
        self._exchange("all_reduce", 2 * _num_bytes(count))()
        count[0].item()


class SplitTeacher:
    """A teacher whose blocks are split over the GPUs of a machine, as `fully_shard` has it.

    A block is gathered while the one before it computes, and copied out of what was received.

    Args:
        blocks: of the teacher, whole.
        gpu: where it is.
        num_gpus: of the machine.
    """

    def __init__(self, blocks: nn.ModuleList, gpu: StandInGpu, num_gpus: int) -> None:
        self._blocks, self._gpu, self._num_gpus = list(blocks), gpu, num_gpus
        self._coming: dict[int, Callable[[], None]] = {}
        for index, block in enumerate(self._blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self._before(index))

    def _before(self, index: int) -> None:
        with self._gpu.phase("teacher gathered"):
            if index not in self._coming:
                self._coming[index] = self._gather(index)
            self._coming.pop(index)()
            for weight in self._blocks[index].parameters():
                torch.empty_like(weight).copy_(weight.detach())
            if index + 1 < len(self._blocks):
                self._coming[index + 1] = self._gather(index + 1)

    def _gather(self, index: int) -> Callable[[], None]:
        weights = [weight.detach() for weight in self._blocks[index].parameters()]
        own = [weight.view(-1)[: math.ceil(weight.numel() / self._num_gpus)] for weight in weights]
        sent = torch.cat(own)
        return self._gpu.exchange("all_gather", _num_bytes(sent) * (self._num_gpus - 1))


def _nothing() -> None:
    """No bytes are under way."""


def _num_bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())
