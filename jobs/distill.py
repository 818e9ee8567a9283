"""Recover a pruned model by distillation: the dense model teaches, DeepSpeed ZeRO trains.

The rows of step t are a function of (seed, t) alone. Every few steps the whole state goes to a
checkpoint; an interrupted recovery carries on from the last one, and on CPU ends in the same bits.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from conf.schema import Config
    from conf.stages import DistillConfig
    from jobs._artifact import StageWriter
    from jobs._stage import StageContext
    from sparsify.distill import TokenCounts
    from sparsify.text import TokenRows

_ROWS = "rows.safetensors"


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the recovered weights."""
    from jobs._sources import source_fingerprint
    from jobs._stage import fingerprints, given_masks, heldout_inputs

    config = context.config
    student = context.models.student("distill")
    return {
        "config": {
            **context.settings("distill", "data"),
            **given_masks(config, student),
            "run.seed": config.run.seed,
        },
        "inputs": {
            **heldout_inputs(context),
            **fingerprints({"student": student, "teacher": context.models.dense}),
            "train": source_fingerprint(config.data, "train"),
        },
    }


def num_steps(config: Config) -> int:
    """Optimizer steps of the whole recovery."""
    return config.distill.num_tokens // (config.distill.batch_size * config.data.sequence_length)


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Tokenise once, train on all workers, check the zeros of what was written."""
    from jobs._artifact import take_json
    from jobs._gate import check_files, masks_of
    from jobs._rotation import teacher_rotation

    student, teacher = context.models.student("distill"), context.models.dense
    rotation = teacher_rotation(student, teacher, context.config.distill.square_head_weight)
    payload = {
        "config": context.worker_config, "student": student, "teacher": teacher,
        "rotation": rotation, "folder": writer.folder, "scratch": writer.scratch,
    }  # fmt: skip
    if not (writer.scratch / _ROWS).is_file():
        context.cluster.run_tasks("distill", prepare_rows, [payload], "sources tokenised")
    context.cluster.run_workers("distill", distill_on_worker, payload, writer.train_storage)
    curve = take_json(writer.folder / "curve.json")
    masks, pattern = masks_of(writer.folder / "model")
    gate = check_files(writer.folder / "model", masks, pattern)
    return {**curve, "gate": gate, "is_teacher_rotated": rotation is not None}


def prepare_rows(context: WorkerContext, payload: dict[str, Any]) -> None:
    """One task: the training rows as one file that all workers map into memory."""
    import torch
    from safetensors.torch import save_file

    from jobs._artifact import disk_errors
    from jobs._sources import load_rows
    from sparsify.models.load import load_tokenizer
    from sparsify.text import shuffled

    torch.set_num_threads(context.num_threads)
    config, path = payload["config"], payload["scratch"] / _ROWS
    wanted = num_steps(config) * config.distill.batch_size
    tokenizer = load_tokenizer(payload["teacher"])
    rows, warning = load_rows(config.data, "train", tokenizer, wanted, config.run.seed)
    if warning:
        context.warn(warning)
    # Neighbouring rows come from one document; a batch of them would be one document's gradient.
    rows = rows[torch.tensor(shuffled(len(rows), config.run.seed))]
    temporary = path.with_suffix(".tmp")
    with disk_errors(path):
        tensors = {"rows": rows.ids_NT, "positions": rows.positions_NT}
        save_file({name: tensor.to(torch.int32) for name, tensor in tensors.items()}, temporary)
        temporary.rename(path)


def learning_rate(settings: DistillConfig, step: int, total: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then linear decay to the smallest share."""
    warmup = min(settings.num_warmup_steps, total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    least = settings.min_learning_rate_share
    return settings.learning_rate * (least + (1 - least) * left)


def distill_on_worker(context: WorkerContext, payload: dict[str, Any]) -> None:
    """On every worker: build the pair, resume if there is a checkpoint, train, write."""
    import torch

    from jobs import _engine
    from jobs._gate import masks_of
    from sparsify.masks import apply_masks_, mask_gradients
    from sparsify.models.load import load_model, load_pair
    from sparsify.models.packed import check_isolation
    from sparsify.rotation import Rotation, fold_rotation

    torch.set_num_threads(context.num_threads)
    torch.manual_seed(payload["config"].run.seed)
    config: Config = payload["config"]
    is_gpu = context.device == "cuda"
    student, tokenizer = load_pair(payload["student"], "float32", context.device)
    dtype = "bfloat16" if config.distill.precision == "bf16" else "float32"
    teacher = load_model(payload["teacher"], dtype, context.device).requires_grad_(False)
    if payload["rotation"] is not None:
        fold_rotation(teacher, Rotation.load(payload["rotation"]))
    if config.data.isolate_documents:
        check_isolation(student)
        check_isolation(teacher)
    masks, pattern = masks_of(payload["student"], student, config.prune)
    masks = {name: mask.to(context.device) for name, mask in masks.items()}
    apply_masks_(student, masks)
    _prepare_student(student, config.distill)
    mask_gradients(student, masks)  # before ZeRO takes the parameters apart
    engine = _engine.build_engine(student, config.distill, context.world_size, is_gpu)
    guard = _engine.MaskGuard(engine, masks)
    guard.clear()
    loop = _Loop(context, config, engine, guard, teacher, payload["scratch"])
    loop.resume()
    loop.train()
    _write(context, payload, loop, tokenizer, masks, str(pattern))


def _prepare_student(student: Any, settings: DistillConfig) -> None:
    """Training mode without dropout (the teacher has none), optional recomputation."""
    import torch

    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if settings.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})


class _Loop:
    """The recovery's steps, from wherever the last checkpoint left them."""

    def __init__(
        self, context: WorkerContext, config: Config, engine: Any, guard: Any, teacher: Any,
        scratch: Path,
    ) -> None:  # fmt: skip
        from sparsify.distill import LossWeights

        self.curve: list[dict[str, Any]] = []
        self.trained_s = 0.0
        self.engine = engine
        self._context = context
        self._settings = config.distill
        self._seed = config.run.seed
        self._length = config.data.sequence_length
        self._total = num_steps(config)
        self._guard = guard
        self._teacher = teacher
        self._scratch = scratch
        settings = config.distill
        self._weights = LossWeights(
            settings.kl_weight, settings.ce_weight, settings.square_head_weight,
            settings.temperature,
        )  # fmt: skip

    def resume(self) -> None:
        """Load the last whole checkpoint, if there is one."""
        from jobs import _engine

        latest = _engine.latest_checkpoint(self._scratch)
        if latest is None:
            return
        world_size = self._context.world_size
        state = _engine.load_checkpoint(self.engine, self._scratch, latest, world_size)
        self.curve, self.trained_s = state["curve"], state["trained_s"]
        self._guard.check(with_moments=False)
        self._context.warn(f"distill: carrying on after step {latest} of {self._total}")

    def train(self) -> None:
        """Run the remaining steps, with a checkpoint every so many."""
        from jobs import _engine

        begun_s = time.monotonic()
        for step in range(len(self.curve), self._total):
            self.curve.append(self._step(step))
            self._report(step)
            done = step + 1
            if done % self._settings.checkpoint_every_steps == 0 and done < self._total:
                now_s = time.monotonic()
                self.trained_s, begun_s = self.trained_s + now_s - begun_s, now_s
                state = {"curve": self.curve, "trained_s": self.trained_s}
                _engine.save_checkpoint(self.engine, self._scratch, done, state)
        self.trained_s += time.monotonic() - begun_s

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
        from safetensors import safe_open

        from sparsify.distill import TokenCounts
        from sparsify.text import TokenRows

        settings, context = self._settings, self._context
        start = step * settings.batch_size
        with safe_open(self._scratch / _ROWS, framework="pt") as file:
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
        import torch
        import torch.distributed as dist

        from jobs import _engine
        from sparsify.distill import distillation_loss
        from sparsify.errors import NonFiniteError

        rate = learning_rate(self._settings, step, self._total)
        _engine.set_learning_rate(self.engine, rate)
        hidden = self._weights.square_head > 0
        batches, counts = self._batches(step)
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            teacher_out = None
            inputs = {
                "input_ids": batch.ids_NT, "position_ids": batch.positions_NT, "use_cache": False,
                "output_hidden_states": hidden,
            }  # fmt: skip
            if self._weights.kl or hidden:
                with torch.no_grad():
                    teacher_out = self._teacher(**inputs)
            student_out = self.engine(**inputs)
            loss, parts = distillation_loss(student_out, teacher_out, batch, self._weights, counts)
            self.engine.backward(loss)
            self.engine.step()
            values = [loss.item(), parts["kl"], parts["ce"], parts["square_head"]]
            sums += torch.tensor(values, dtype=torch.float64) / len(batches)
        if self._context.world_size > 1:
            on_device = sums.to(self._context.device)
            dist.all_reduce(on_device)
            sums = on_device.cpu() / self._context.world_size
        norm = self.engine.get_global_grad_norm()
        norm = float(norm) if norm is not None else 0.0
        total, kl, ce, square_head = sums.tolist()
        if not torch.isfinite(sums).all() or norm != norm or norm == float("inf"):
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


def _write(
    context: WorkerContext, payload: dict[str, Any], loop: _Loop, tokenizer: Any,
    masks: dict[str, Any], pattern: str,
) -> None:  # fmt: skip
    """Rank 0 writes the recovered model and the loss curve."""
    from jobs import _engine
    from jobs._artifact import disk_errors, model_fingerprint, write_json
    from jobs._rotation import carry_rotation
    from jobs._stage import MASKS, read_sparsity, write_sparsity
    from sparsify.masks import save_masks

    state = _engine.gathered_state_dict(loop.engine)
    if state is None:
        return
    folder = payload["folder"] / "model"
    before = read_sparsity(payload["student"]) or {}
    num_tokens = loop.curve[-1]["num_tokens"]
    provenance = {
        **before.get("provenance", {}),
        "dense_path": str(payload["teacher"].resolve()),
        "dense_sha256": model_fingerprint(payload["teacher"]),
        "num_recovery_tokens": num_tokens,
    }
    on_cpu = {name: mask.cpu() for name, mask in masks.items()}
    with disk_errors(folder):
        loop.engine.module.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        save_masks(folder / MASKS, on_cpu)
        carry_rotation(payload["student"], folder)
        write_sparsity(folder, on_cpu, pattern, before.get("method", "given"), provenance)
    write_json(
        payload["folder"] / "curve.json",
        {
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / loop.trained_s,
            "steps": loop.curve,
        },
    )


if __name__ == "__main__":
    from jobs._entry import main

    main("distill")
