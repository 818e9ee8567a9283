"""The recovery on one worker: steps, checkpoints, and going on from wherever the last one was.

The rows of step t are a function of (seed, t) alone, so the state of a run is its number of steps,
the weights and the moments: any number of workers goes on with what any other number left.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from jobs import _engine
from jobs._checkpoint import Checkpoints, Retention
from sparsify.distill import LossWeights, TokenCounts, distillation_loss
from sparsify.errors import NonFiniteError
from sparsify.text import TokenRows

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from conf.schema import Config
    from conf.stages import DistillConfig

ROWS = "rows.safetensors"


def num_steps(config: Config) -> int:
    """Optimizer steps of the whole recovery."""
    return config.distill.num_tokens // (config.distill.batch_size * config.data.sequence_length)


def learning_rate(settings: DistillConfig, step: int, total: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then linear decay to the smallest share."""
    warmup = min(settings.num_warmup_steps, total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    least = settings.min_learning_rate_share
    return settings.learning_rate * (least + (1 - least) * left)


def first_rows(scratch: Path) -> TokenRows:
    """The first row of training, to try a model on."""
    with safe_open(scratch / ROWS, framework="pt") as file:
        parts = (file.get_slice(name)[:1].long() for name in ("rows", "positions"))
        return TokenRows(*parts)


class Recovery:
    """The recovery's steps, from wherever the last checkpoint left them.

    Args:
        context: this worker.
        config: of the run.
        engine: what `jobs._engine` made of the student.
        guard: holds the zeros.
        teacher: the dense model, without gradients.
        masks: keep masks, for the checkpoints.
        scratch: folder of the rows and the checkpoints, shared by all workers.
    """

    def __init__(
        self, context: WorkerContext, config: Config, engine: Any, guard: _engine.MaskGuard,
        teacher: Any, masks: dict[str, torch.Tensor], scratch: Path,
    ) -> None:  # fmt: skip
        settings = config.distill
        self.curve: list[dict[str, Any]] = []
        self.trained_s = 0.0
        self.engine = engine
        self._context = context
        self._settings = settings
        self._length = config.data.sequence_length
        self._total = num_steps(config)
        self._guard = guard
        self._teacher = teacher
        self._masks = masks
        self._scratch = scratch
        retention = Retention(settings.keep_checkpoints, settings.milestone_every_steps)
        self._checkpoints = Checkpoints(scratch, retention)
        self._weights = LossWeights(
            settings.kl_weight, settings.ce_weight, settings.square_head_weight,
            settings.temperature,
        )  # fmt: skip

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one."""
        found = self._checkpoints.latest(self._context.warn)
        if found is None:
            return
        step, checkpoint = found
        state = checkpoint.state
        _engine.restore(self.engine, checkpoint, state["num_updates"])
        self.curve, self.trained_s = state["curve"], state["trained_s"]
        self._guard.check()
        self._context.warn(f"distill: carrying on after step {step} of {self._total}")

    def train(self) -> None:
        """Run the remaining steps, with a checkpoint every so many."""
        begun_s = time.monotonic()
        for step in range(len(self.curve), self._total):
            self.curve.append(self._step(step))
            self._report(step)
            done = step + 1
            every = self._settings.checkpoint_every_steps
            if every and done % every == 0 and done < self._total:
                now_s = time.monotonic()
                self.trained_s, begun_s = self.trained_s + now_s - begun_s, now_s
                self._save(done)
        self._checkpoints.wait()
        self.trained_s += time.monotonic() - begun_s

    def _save(self, step: int) -> None:
        state = {
            "curve": self.curve, "trained_s": self.trained_s,
            "num_updates": _engine.num_updates(self.engine),
        }  # fmt: skip
        fragments = _engine.state_fragments(self.engine, for_saving=True)
        self._checkpoints.save(step, fragments, self._masks, state)

    def _report(self, step: int) -> None:
        figures = self.curve[-1]
        self._context.progress(step + 1, self._total, f"steps, loss {figures['loss']:.4f}")
        metrics = {f"distill/{k}": v for k, v in figures.items() if k != "step"}
        self._context.metrics(metrics, step + 1)

    def _batches(self, step: int) -> tuple[list[TokenRows], TokenCounts]:
        """This rank's micro-batches of a step, and what each divides its sums by.

        The file's rows are in their training order already (shuffled by the seed), so step t takes
        the t-th run of `batch_size` rows, whatever the number of workers.
        """
        settings, context = self._settings, self._context
        start = step * settings.batch_size
        with safe_open(self._scratch / ROWS, framework="pt") as file:
            ids_NT, positions_NT = (
                file.get_slice(name)[start : start + settings.batch_size].long()
                for name in ("rows", "positions")
            )
        rows = TokenRows(ids_NT, positions_NT)
        # Every rank sees the whole step here, so the tokens of all of them need not be added up.
        counts = TokenCounts.of(rows).shared_by(settings.batch_size // settings.micro_batch_size)
        own = rows[context.rank :: context.world_size].to(context.device)
        return own.split(settings.micro_batch_size), counts

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step over all workers; figures are means over the whole batch."""
        rate = learning_rate(self._settings, step, self._total)
        _engine.set_learning_rate(self.engine, rate)
        batches, counts = self._batches(step)
        sums = torch.zeros(4, dtype=torch.float64)
        for number, batch in enumerate(batches):
            sums += self._backward(batch, counts) / len(batches)
            if number + 1 < len(batches):
                self.engine.step()
        sums = self._mean_over_workers(sums)
        self.engine.step()
        norm = _engine.grad_norm(self.engine)
        total, kl, ce, square_head = sums.tolist()
        if not torch.isfinite(sums).all() or norm != norm:
            raise NonFiniteError(
                f"distill: loss {total} and gradient norm {norm} at step {step + 1}; lower "
                "distill.learning_rate, or use distill.precision=fp32"
            )
        self._guard.check()
        tokens = (step + 1) * self._settings.batch_size * self._length
        return {
            "step": step + 1, "num_tokens": tokens, "loss": total, "kl": kl, "ce": ce,
            "square_head": square_head, "learning_rate": rate, "grad_norm": norm,
        }  # fmt: skip

    def _backward(self, batch: TokenRows, counts: TokenCounts) -> torch.Tensor:
        """Gradients of one micro-batch; (loss, kl, ce, square_head) as float64 (4,)."""
        hidden = self._weights.square_head > 0
        inputs = {
            "input_ids": batch.ids_NT, "position_ids": batch.positions_NT, "use_cache": False,
            "output_hidden_states": hidden,
        }  # fmt: skip
        teacher_out = None
        if self._weights.kl or hidden:
            with torch.no_grad():
                teacher_out = self._teacher(**inputs)
        student_out = self.engine(**inputs)
        loss, parts = distillation_loss(student_out, teacher_out, batch, self._weights, counts)
        self.engine.backward(loss)
        values = [loss.item(), parts["kl"], parts["ce"], parts["square_head"]]
        return torch.tensor(values, dtype=torch.float64)

    def _mean_over_workers(self, sums: torch.Tensor) -> torch.Tensor:
        if self._context.world_size == 1:
            return sums
        on_device = sums.to(self._context.device)
        dist.all_reduce(on_device)
        return on_device.cpu() / self._context.world_size
