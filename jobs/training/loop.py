"""The recovery on one worker: steps, checkpoints, and continuing from wherever the last one was.

The rows of step t are a function of (seed, t) alone, so the state of a run is its number of steps,
the weights and the moments: any number of workers continues what any other number left. Workers
speak once per step: the figures of the step, what rank 0 was asked for, and the token counts of the
next step travel in one small sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.preempt import DrainWatch, Request, StopRequests
from cluster.runtime.worker import WorkerContext
from cluster.watchdog import Watchdog
from conf.schema import Config
from jobs.training import engine, optimizer, zero_state
from jobs.training.batches import Batch, Batches
from jobs.training.checkpoint import MASKS_FILE, Checkpoints, Retention
from jobs.training.heldout import Heldout, as_metrics
from jobs.training.ledger import EVALUATE, SAVE
from jobs.training.mask_guard import MaskGuard
from jobs.training.pace import Pace
from jobs.training.schedule import num_steps, planned_rates
from sparsify.data.rows import TokenRows
from sparsify.data.teacher_samples import Sample
from sparsify.distillation import TokenCounts
from sparsify.distillation.head_loss import Teacher
from sparsify.errors import NonFiniteError, StoppedEarlyError
from sparsify.masks.storage import BitMasks, load_masks
from sparsify.models.calls import run_model
from sparsify.models.lm_head import LanguageHead
from sparsify.models.varlen import documents_of
from sparsify.params import LossWeights
from sparsify.training.fragments import Checkpoint
from sparsify.training.health import SpikeGuard, SpikePolicy
from sparsify.training.moving_masks import MovingMasks

_DRAINED = "a node is being drained"

_FIGURES = ("loss", "kl", "reverse_kl", "ce", "square_head", "agreement")

_NOT_SAMPLED = ("reverse_kl", "square_head", "agreement")  # what a teacher's samples do not say


@dataclass(frozen=True, eq=False)
class Setup:
    """What a recovery is made of; `jobs.training.build` puts it together."""

    context: WorkerContext
    """this worker"""
    config: Config
    """of the run"""
    engine: Any
    """what `jobs.training.engine` made of the student"""
    guard: MaskGuard
    """holds the zeros"""
    teacher: LanguageHead | None
    """the dense model, without gradients, in its two parts; None: batches have samples, or there
    is no teacher"""
    moving: MovingMasks | None
    """lets the masks move for a part of the run; None where they stay"""
    masks: BitMasks
    """keep masks to start with"""
    batches: Batches
    """the rows"""
    heldout: Heldout | None
    """scores on the way; None for none"""
    pace: Pace
    """the clock"""
    scratch: Path
    """folder of the checkpoints, shared by all workers"""
    run_dir: Path
    """folder of the run, where switches are looked for"""


class Recovery:
    """The recovery's steps, from wherever the last checkpoint left them."""

    def __init__(self, setup: Setup) -> None:
        settings = setup.config.distill
        self.curve: list[dict[str, Any]] = []
        self.heldout_curve: list[dict[str, Any]] = []
        self.engine, self.masks, self.batches = setup.engine, setup.masks, setup.batches
        self.pace = setup.pace
        self._context, self._settings, self._scratch = setup.context, settings, setup.scratch
        self._name = setup.context.name
        self._length = setup.config.data.sequence_length
        self._total = num_steps(setup.config)
        self._guard, self._moving, self._heldout = setup.guard, setup.moving, setup.heldout
        self._unknown: tuple[str, ...] = () if setup.teacher else _NOT_SAMPLED
        if setup.teacher is None and not setup.batches.has_cache:
            self._unknown = ("kl", *_NOT_SAMPLED)
        if setup.teacher is not None:
            self._teacher = self._teacher_base = setup.teacher.base
            self._teacher_head = setup.teacher.plain()
        self._losses, self._rates = settings.losses(), planned_rates(settings, self._total)
        retention = Retention(settings.keep_checkpoints, settings.milestone_every_steps)
        self._checkpoints = Checkpoints(setup.scratch, retention, self._name)
        policy = SpikePolicy(policy=settings.on_bad_step, max_in_row=settings.max_bad_steps)
        self._spikes = SpikeGuard(policy)
        hours = settings.time_limit_hours
        deadline_s = None if hours is None else setup.pace.begun_s + hours * 3600
        self._requests = StopRequests(setup.run_dir, deadline_s, settings.time_reserve_s)
        self._drains = DrainWatch()
        self._is_due = False  # by Young's formula
        self.is_cut = False  # at the time limit, with distill.on_time_limit=finish
        self._ready: Batch | None = None
        self._ready_sums = torch.zeros(3, dtype=torch.float64)
        self._flops = 0.0

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one."""
        found = self._checkpoints.latest(self._context.warn)
        if found is not None:
            step, checkpoint = found
            self._restore(checkpoint)
            self._spikes.load_state_dict(checkpoint.state["spikes"])
            self._context.say(f"{self._name}: continues after step {step} of {self._total}")

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        zero_state.restore(self.engine, checkpoint, state["num_updates"])
        self.curve, self.heldout_curve = state["curve"], state["heldout_curve"]
        self.is_cut = state["is_cut"]
        self.pace.resumed(len(self.curve), state["trained_s"])
        self._set_masks(load_masks(checkpoint.folder / MASKS_FILE))
        if self._moving is not None:
            (self._moving.freeze if state["masks_are_frozen"] else self._moving.thaw)()
        if self._is_held:
            self._guard.check()

    def train(self) -> None:
        """Run the remaining steps, with checkpoints on the way.

        Raises:
            StoppedEarlyError: asked to stop; the checkpoint is written.
            NonFiniteError: bad steps beyond what the policy allows.
        """
        settings, context = self._settings, self._context
        stacks = self._scratch / f"stacks-rank-{context.rank:05d}.txt"
        floor_s, pause_s = settings.hang_after_s, settings.pause_limit_s
        with Watchdog(stacks, floor_s=floor_s, start_limit_s=max(1800.0, floor_s),
                      on_hang=context.alert) as watchdog:  # fmt: skip
            while (step := len(self.curve)) < self._total and not self.is_cut:
                self._freeze_when_due(step)
                with self.pace.step(step + 1):
                    figures, request = self._step(step)
                if figures is None:
                    with watchdog.allowing(pause_s):
                        self._roll_back()
                    continue
                self.curve.append(figures)
                self._check_replicas(step + 1)
                self.pace.say(step + 1, self._total, figures, self._flops)
                self.pace.forecast(self.curve, self._rates)
                watchdog.beat()
                self._checkpoints.raise_failure()
                if self._is_scored(step + 1):
                    with watchdog.allowing(pause_s), self.pace.interval(EVALUATE):
                        self._score(step + 1)
                if step + 1 < self._total and self._should_save(step + 1, request):
                    with watchdog.allowing(pause_s), self.pace.interval(SAVE):
                        self._save(step + 1, request)
            with watchdog.allowing(pause_s):
                self._checkpoints.wait()
        if self.is_cut:
            self._context.warn(
                f"{self._name}: the time limit ends it after step {step} of {self._total}, before "
                "the learning rate had come down"
            )

    @property
    def mask_share_moved(self) -> float | None:
        """Share of the kept weights that were pruned at the start; None where masks never move."""
        return None if self._moving is None else self._moving.share_moved()

    @property
    def step_flops(self) -> float:
        """What the rows of the last step ask for on all workers; 0 where it is not known."""
        return self._flops

    # --- one step

    def _step(self, step: int) -> tuple[dict[str, Any] | None, Request]:
        """One optimizer step over all workers; figures are means over the whole batch.

        Returns:
            The figures, None if the run has to go back to its last checkpoint; and what rank 0
            was asked for.
        """
        rate = self._rates[step]
        optimizer.set_learning_rate(self.engine, rate)
        batch, counts = self._batch(step)
        weights = self._losses.at(step / self._total)
        sums = torch.zeros(len(_FIGURES), dtype=torch.float64, device=self._context.device)
        parts = self.batches.micro_batches(batch, self._context.device)
        samples = self.batches.samples(batch, self._context.device)
        for number, (rows, sample) in enumerate(zip(parts, samples, strict=True)):
            sums += self._backward(rows, weights, counts, sample) / len(parts)
            if number + 1 < len(parts):
                self.engine.step()
        values, request = self._exchange(step, sums)
        verdict = self._update(step, values["loss"])
        if verdict == "rollback":
            return None, request
        if self._is_held:
            self._guard.check()
        # NaN and infinity are no JSON: a step that was left out for them says null.
        seen = {name: value if math.isfinite(value) else None for name, value in values.items()}
        seen |= dict.fromkeys(self._unknown)
        norm = optimizer.grad_norm(self.engine)
        done = step + 1
        figures: dict[str, Any] = {
            "step": done, "num_tokens": done * self._settings.batch_size * self._length,
            "loss": seen["loss"], "kl": seen["kl"], "reverse_kl": seen["reverse_kl"],
            "ce": seen["ce"], "square_head": seen["square_head"], "agreement": seen["agreement"],
            "learning_rate": rate, "grad_norm": norm if math.isfinite(norm) else None,
            "is_skipped": verdict == "skip", "row_crc": batch.row_crc,
        }  # fmt: skip
        return figures, request

    def _batch(self, step: int) -> tuple[Batch, TokenCounts]:
        """This worker's rows of a step, and the counts that all workers' micro-batches share."""
        if self._ready is None or self._ready.step != step:  # the first step, or after a rollback
            self._ready = self.batches.at(step)
            self._ready_sums = self._summed(self._ready.own.to(self._context.device)).cpu()
        self._flops = float(self._ready_sums[2])
        return self._ready, self.batches.shares(self._ready_sums)

    def _backward(
        self, rows: TokenRows, weights: LossWeights, counts: TokenCounts, sample: Sample | None
    ) -> torch.Tensor:
        """Gradients of one micro-batch; the figures as float64 on the device."""
        loss, values = self._forward(rows, weights, counts, sample)
        self.engine.backward(loss)
        values = {"loss": loss.detach(), **values}
        zero = loss.new_zeros(())
        return torch.stack([values.get(name, zero).double() for name in _FIGURES])

    def _forward(
        self, rows: TokenRows, weights: LossWeights, counts: TokenCounts,
        sample: Sample | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """Loss and figures of some rows: the teacher's hidden states, then the student's loss."""
        teacher: Teacher | Sample | None = sample
        states = None
        hidden = weights.square_head > 0
        if sample is None and (weights.uses_teacher_logits or hidden):
            with torch.no_grad():
                documents = documents_of(self._teacher_base, rows)
                output = run_model(self._teacher, rows, output_hidden_states=hidden, **documents)
            teacher = Teacher(output.last_hidden_state, self._teacher_head)
            states = output.hidden_states if hidden else None
        loss, values = self.engine(
            rows=rows, weights=weights, counts=counts, teacher=teacher, teacher_states=states
        )
        return loss, values

    def _exchange(self, step: int, sums: torch.Tensor) -> tuple[dict[str, float], Request]:
        """The step's figures over all workers, rank 0's requests, and the next step's counts."""
        context = self._context
        ahead = self.batches.at(step + 1) if step + 1 < self._total else None
        request = Request()
        if context.rank == 0:
            request = self._requests.poll(self.pace.step_s)
        finishes = request.is_time_limit and self._settings.on_time_limit == "finish"
        asked = [
            self.pace.wants_checkpoint(step + 1), request.should_save,
            request.should_stop and not finishes, self._drains.is_due(), finishes,
        ]  # fmt: skip
        flags = torch.tensor([float(context.rank == 0 and flag) for flag in asked])
        own = torch.zeros(3, dtype=torch.float64) if ahead is None else ahead.own
        message = torch.cat([sums, torch.cat([flags.double(), own]).to(sums.device)])
        message = self._summed(message).cpu()
        self._ready, self._ready_sums = ahead, message[-3:]
        figures = message[: len(_FIGURES)] / context.world_size
        flags = message[len(_FIGURES) : -3]
        self._is_due, save, stop, drains, is_over = (bool(flag) for flag in flags)
        self.is_cut = is_over and ahead is not None
        if drains and self._drains.is_news(context.is_draining()):
            save, request = True, Request(True, reason=request.reason or _DRAINED)
            context.say(f"{self._name}: {_DRAINED}; saving, then continuing")
        values = dict(zip(_FIGURES, figures.tolist(), strict=True))
        return values, Request(save or stop, stop, request.reason)

    def _update(self, step: int, loss: float) -> str:
        """Make the step's update, unless the step is bad: "ok", "skip" or "rollback"."""
        verdicts = []

        def is_sound() -> bool:
            verdicts.append(self._spikes.judge(step, loss, optimizer.grad_norm(self.engine)))
            return verdicts[-1].action == "ok"

        if self._is_held:
            self._guard.mask_gradients()
        optimizer.step_if(self.engine, is_sound)
        if not verdicts:  # left out by DeepSpeed: the gradient is not finite
            is_sound()
        verdict = verdicts[0]
        if verdict.action == "stop":
            raise NonFiniteError(
                f"{self._name}: {verdict.reason}; lower {self._name}.learning_rate, look at the "
                f"data of that step, or use {self._name}.precision=fp32"
            )
        if verdict.action != "ok":
            self._context.warn(f"{self._name}: {verdict.reason}; its update is left out")
        return str(verdict.action)

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        if self._context.world_size > 1:
            dist.all_reduce(values)
        return values

    # --- between steps

    @property
    def _is_held(self) -> bool:
        """Whether pruned weights are zero now: not while masks move."""
        return self._moving is None or self._moving.is_frozen

    def _freeze_when_due(self, step: int) -> None:
        """Take masks again, or for the last time, as the share of the run says."""
        moving, settings = self._moving, self._settings
        if moving is None or moving.is_frozen:
            return
        # One step at least with masks that stay, and so with zeros that are proven.
        if step < min(round(settings.moving_share * self._total), self._total - 1):
            if step and step % settings.mask_refresh_steps == 0:
                moving.refresh(engine.gathered(self.engine))
            return
        moving.freeze()
        self._set_masks(moving.masks())
        self._guard.clear()
        zero_state.refresh_weights(self.engine)
        share = moving.share_moved()
        self._context.say(
            f"{self._name}: masks stay from step {step} on; {share:.1%} of them moved"
        )

    def _set_masks(self, masks: BitMasks) -> None:
        self.masks = masks
        self._guard.set_masks(masks)
        if self._moving is not None:
            self._moving.load(masks)

    def _check_replicas(self, step: int) -> None:
        every = self._settings.checksum_every_steps
        if every and step % every == 0:
            zero_state.check_replicas(self.engine, step)

    def _is_scored(self, step: int) -> bool:
        every = self._settings.heldout_every_steps
        return self._heldout is not None and bool(every) and step % (every or 1) == 0

    def _score(self, step: int) -> None:
        assert self._heldout is not None
        scores = self._heldout.score(lambda *given: self._forward(*given)[1], self._summed)
        self.heldout_curve.append({"step": step, "scores": scores})
        self._context.metrics(as_metrics(scores, self._name), step)

    def _should_save(self, step: int, request: Request) -> bool:
        every = self._settings.checkpoint_every_steps
        return request.should_save or self._is_due or bool(every and step % every == 0)

    def _save(self, step: int, request: Request) -> None:
        if self._moving is not None and not self._moving.is_frozen:
            self.masks = self._moving.masks()
        state = {
            "curve": self.curve, "heldout_curve": self.heldout_curve,
            "trained_s": self.pace.trained_s,
            "num_updates": zero_state.num_updates(self.engine),
            "spikes": self._spikes.state_dict(), "masks_are_frozen": self._is_held,
            "is_cut": self.is_cut,
        }  # fmt: skip
        fragments = zero_state.state_fragments(self.engine, for_saving=True)
        stall_s = self._checkpoints.save(step, fragments, self.masks, state)
        dist.barrier()  # whose disk is quick waits here, not in a step, whose limit is short
        self.pace.saved(step, stall_s)
        if not request.should_save:
            return
        self._checkpoints.wait()
        reason = [request.reason]
        dist.broadcast_object_list(reason, src=0)  # rank 0 has waited for the commit
        if self._context.rank == 0:
            self._requests.done(request)
        if request.should_stop:
            raise StoppedEarlyError(
                f"{self._name}: stopped after step {step} of {self._total} with a checkpoint "
                f"({reason[0]}); the same command continues from there"
            )

    def _roll_back(self) -> None:
        """Load the last checkpoint and continue after it without the steps that were bad.

        Raises:
            NonFiniteError: there is no checkpoint yet.
        """
        self._checkpoints.wait()
        dist.barrier()
        found = self._checkpoints.latest(self._context.warn)
        if found is None:
            raise NonFiniteError(
                f"{self._name}: bad steps in a row before the first checkpoint; lower "
                f"{self._name}.learning_rate or raise {self._name}.num_warmup_steps"
            )
        step, checkpoint = found
        self._restore(checkpoint)
        self._spikes.rolled_back(checkpoint.state["spikes"])
        self._ready = None
        self._context.say(f"{self._name}: back to step {step}; bad steps are left out from here on")
