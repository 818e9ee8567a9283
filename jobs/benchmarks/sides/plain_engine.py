"""AdamW without DeepSpeed, under the few names of DeepSpeed's engine that a recovery's step uses.

For machines that have torch and no DeepSpeed, one process only. Arithmetic is that of ZeRO in the
same precision: float32 masters, moments and sums of gradients, and with bf16 a copy of the weights
that computes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from conf.options.distill import DistillConfig
from jobs.training.optimizer import GatedAdamW
from jobs.training.zero_state import MOMENTS


class _Whole:
    """What the guard asks of the link from a bf16 weight to its float32 copies: here, all of it."""

    lp_fragment_address = SimpleNamespace(start=0)

    def __init__(self, master: Tensor, state: dict[str, Tensor]) -> None:
        self._master, self._state = master, state

    def get_lp_grad_fragment(self, index: int) -> Tensor:
        """The sum of the step's gradients."""
        assert self._master.grad is not None, "asked for after the backward passes"
        return self._master.grad

    def get_hp_fragment(self, optim_state_key: str | None = None) -> Tensor:
        """The master, or a moment by its name."""
        return self._state[optim_state_key] if optim_state_key else self._master


class PlainEngine:
    """A model and its AdamW.

    Args:
        model: float32; its weights become bf16 if the precision is.
        config: of the recovery.
        uses_gpu: whether it is on a GPU.
    """

    def __init__(self, model: nn.Module, config: DistillConfig, uses_gpu: bool) -> None:
        self.module = model
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._masters = list(self._params)
        if config.precision == "bf16":
            self._masters = [nn.Parameter(p.detach().clone()) for p in self._params]
            for param in self._params:
                param.data = param.data.bfloat16()
        groups = [
            {"params": [m for m in self._masters if (m.ndim >= 2) == is_matrix], "weight_decay": w}
            for is_matrix, w in ((True, config.weight_decay), (False, 0.0))
        ]
        self.optimizer = GatedAdamW(
            [group for group in groups if group["params"]], lr=config.learning_rate,
            betas=(config.beta1, config.beta2), eps=1e-8, fused=True,
        )  # fmt: skip
        self.optimizer.max_grad_norm = config.max_grad_norm
        for param, master in zip(self._params, self._masters, strict=True):
            count = torch.zeros((), device=master.device if uses_gpu else "cpu")
            moments = {key: torch.zeros_like(master) for key in MOMENTS}
            self.optimizer.state[master] = {"step": count, **moments}
            if master is not param:
                param._hp_mapping = _Whole(master, self.optimizer.state[master])  # type: ignore[attr-defined]
                param._index_in_param_group = 0  # type: ignore[attr-defined]
        self._num_parts = config.batch_size // config.micro_batch_size
        self._num_done = 0

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward."""
        return self.module(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        (loss / self._num_parts).backward()
        self._num_done += 1
        for param, master in zip(self._params, self._masters, strict=True):
            if master is param or param.grad is None:
                continue
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                master.grad += param.grad
            param.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """The update, at the end of a batch."""
        if self._num_done < self._num_parts:
            return
        self._num_done = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        for param, master in zip(self._params, self._masters, strict=True):
            if master is not param:
                param.copy_(master)

    def zero_optimization_stage(self) -> int:
        """0: nothing is split."""
        return 0
