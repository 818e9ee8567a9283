"""The optimizer's state as plain tensors by name, whatever the ZeRO stage, for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn


class Gated:
    """An AdamW that asks before an update: if it may not, weights and moments stay as they are.

    The engine's step runs as usual either way and clears the gradients. Without ZeRO it also clips,
    and leaves out a step whose gradient norm is not finite; DeepSpeed does both in its other
    stages.
    """

    may_update: Callable[[], bool] | None = None
    """asked once per step of the engine, when the gradient's norm is known"""
    answer: bool | None = None
    """to the question, in this step of the engine"""
    max_grad_norm: float | None = None
    grad_norm: float | None = None
    moment_names: ClassVar[dict[str, str]] = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    """a moment as checkpoints call it -> as the optimizer's state does"""
    param_groups: Any
    state: Any

    def is_due(self) -> bool:
        """Clip, and ask."""
        if self.max_grad_norm is not None:
            params = [p for group in self.param_groups for p in group["params"]]
            self.grad_norm = float(nn.utils.clip_grad_norm_(params, self.max_grad_norm))
            if not self.grad_norm < float("inf"):
                return False
        if self.answer is None:
            self.answer = True if self.may_update is None else self.may_update()
        return self.answer

    def make_state(self, flat_params: Iterable[Any]) -> None:
        """The state before the first step, of what the optimizer updates."""
        for flat in flat_params:
            step = torch.zeros((), device=flat.device if flat.is_cuda else "cpu")
            moments = {key: torch.zeros_like(flat) for key in self.moment_names.values()}
            self.state[flat] = {"step": step, **moments}

    def set_num_updates(self, count: int) -> None:
        """How many steps it has made, for the correction of its moments."""
        for entry in self.state.values():
            entry["step"].fill_(count)


class GatedAdamW(Gated, torch.optim.AdamW):
    """torch's."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, or none; DeepSpeed calls it once per group of parameters."""
        return super().step(closure) if self.is_due() else None


def is_matrix(param: Any) -> bool:
    """Of the whole parameter: what ZeRO-3 leaves of it in place has no shape."""
    return len(getattr(param, "ds_shape", param.shape)) >= 2


def base_optimizer(engine: Any) -> Gated:
    """The AdamW inside whatever ZeRO wrapped around it."""
    outer = engine.optimizer
    found: Gated = outer if isinstance(outer, Gated) else outer.optimizer
    return found


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the rate of every parameter group for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def step_if(engine: Any, may_update: Callable[[], bool]) -> None:
    """The engine's step at the end of a batch, with its update only if `may_update` says so.

    `may_update` is asked on every rank when the gradient's norm is known (`grad_norm`), and must
    answer alike on all; it is not asked where the norm is not finite: then there is no update.
    """
    optimizer = base_optimizer(engine)
    optimizer.may_update, optimizer.answer = may_update, None
    try:
        engine.step()
    finally:
        optimizer.may_update = None


def grad_norm(engine: Any) -> float:
    """Global norm of the step's gradient, before clipping; NaN where it is not finite."""
    outer = engine.optimizer
    norm = outer.grad_norm if isinstance(outer, Gated) else outer._global_grad_norm
    # DeepSpeed says -1 or infinity of a norm that is not finite.
    return float(norm) if norm is not None and 0 <= float(norm) < float("inf") else float("nan")
