"""Recover a pruned model by distillation: the dense model teaches, DeepSpeed ZeRO trains.

The rows of step t are a function of (seed, t) alone. Every few steps the whole state goes to a
checkpoint; an interrupted recovery carries on from the last one, and on CPU ends in the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from conf.schema import Config
    from jobs._artifact import StageWriter
    from jobs._recovery import Recovery
    from jobs._stage import StageContext

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


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Tokenise once, train on all workers, check the zeros of what was written."""
    from jobs._artifact import take_json
    from jobs._gate import check_files, masks_of
    from jobs._rotation import teacher_rotation

    student, teacher = context.models.student("distill"), context.models.dense
    weight = context.config.distill.losses().peak("square_head")
    rotation = teacher_rotation(student, teacher, weight)
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
    from jobs._recovery import num_steps
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


def distill_on_worker(context: WorkerContext, payload: dict[str, Any]) -> None:
    """On every worker: build the pair, resume if there is a checkpoint, train, write."""
    import torch

    from jobs import _engine
    from jobs._gate import masks_of
    from jobs._recovery import Recovery, first_rows
    from jobs._teacher import load_teacher, place_teacher
    from sparsify.masks import apply_masks_, mask_gradients
    from sparsify.models.load import load_pair
    from sparsify.models.packed import check_isolation
    from sparsify.models.training import compile_layers, prepare_student, recompute_layers

    torch.set_num_threads(context.num_threads)
    torch.manual_seed(payload["config"].run.seed)
    config: Config = payload["config"]
    is_gpu = context.device == "cuda"
    student, tokenizer = load_pair(payload["student"], "float32", context.device)
    teacher = load_teacher(payload["teacher"], config.distill, payload["rotation"], context)
    if config.data.isolate_documents:
        check_isolation(student)
        check_isolation(teacher)
    masks, pattern = masks_of(payload["student"], student, config.prune)
    masks = {name: mask.to(context.device) for name, mask in masks.items()}
    apply_masks_(student, masks)
    place_teacher(teacher, config.distill, context, first_rows(payload["scratch"]))
    prepare_student(student)
    recompute_layers(student, config.distill.recompute_share)
    if config.distill.compile:
        compile_layers(student)
        compile_layers(teacher)
    mask_gradients(student, masks)  # before ZeRO takes the parameters apart
    engine = _engine.build_engine(student, config.distill, context.world_size, is_gpu)
    guard = _engine.MaskGuard(engine, masks)
    guard.clear()
    recovery = Recovery(context, config, engine, guard, teacher, masks, payload["scratch"])
    recovery.resume()
    recovery.train()
    _write(payload, recovery, tokenizer, masks, str(pattern))


def _write(
    payload: dict[str, Any], recovery: Recovery, tokenizer: Any, masks: dict[str, Any], pattern: str
) -> None:
    """Rank 0 writes the recovered model and the loss curve."""
    from jobs import _engine
    from jobs._artifact import disk_errors, model_fingerprint, write_json
    from jobs._rotation import carry_rotation
    from jobs._stage import MASKS, read_sparsity, write_sparsity
    from sparsify.masks import save_masks

    state = _engine.gathered_state_dict(recovery.engine)
    if state is None:
        return
    folder = payload["folder"] / "model"
    before = read_sparsity(payload["student"]) or {}
    num_tokens = recovery.curve[-1]["num_tokens"]
    provenance = {
        **before.get("provenance", {}),
        "dense_path": str(payload["teacher"].resolve()),
        "dense_sha256": model_fingerprint(payload["teacher"]),
        "num_recovery_tokens": num_tokens,
    }
    on_cpu = {name: mask.cpu() for name, mask in masks.items()}
    with disk_errors(folder):
        recovery.engine.module.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        save_masks(folder / MASKS, on_cpu)
        carry_rotation(payload["student"], folder)
        write_sparsity(folder, on_cpu, pattern, before.get("method", "given"), provenance)
    write_json(
        payload["folder"] / "curve.json",
        {
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / recovery.trained_s,
            "steps": recovery.curve,
        },
    )


if __name__ == "__main__":
    from jobs._entry import main

    main("distill")
