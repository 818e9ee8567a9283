"""On every worker: a sparse (or dense) model trained on records or text, by the recovery's engine.

The rows are made once, by one task; everything after that is a recovery without a teacher, or with
the one that was named: the same loop, checkpoints and proof of the zeros.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.runtime.worker import WorkerContext
from conf.schema import Config
from jobs.corpus.chats import TEXT, Chats
from jobs.corpus.documents import Remarks
from jobs.corpus.rows import load_rows
from jobs.corpus.templates import Renderer, examples_of, template_of
from jobs.runs.artifact import StageWriter
from jobs.runs.folder import disk_errors
from jobs.training.build import build_recovery, figures_of
from jobs.training.engine import Partitioner, build_engine, gathered_state_dict
from jobs.training.heldout import Heldout, write_heldout
from jobs.training.inputs import checked_store
from jobs.training.ledger import START
from jobs.training.loop import Recovery
from jobs.training.pace import Pace
from jobs.training.schedule import num_steps
from jobs.training.student import Student, load_student
from jobs.training.teacher import load_teacher, probe_logits
from sparsify.adapters.lora import adapters_of
from sparsify.data.examples import pack
from sparsify.data.rows import TokenRows
from sparsify.data.shards import MANIFEST
from sparsify.data.store import TokenStore
from sparsify.data.store_write import write_rows
from sparsify.errors import InputError
from sparsify.evaluation.divergence import forward_kl
from sparsify.formats.basis import carry_rotation, teacher_rotation
from sparsify.formats.sparse_folder import MASKS, model_fingerprint, read_sparsity, write_sparsity
from sparsify.formats.verify import check_files, masks_of
from sparsify.masks.storage import BitMasks, save_masks
from sparsify.models.lm_head import alike_tokens
from sparsify.models.load import load_tokenizer
from sparsify.models.save import save_model
from sparsify.pattern import Pattern

_STORE, _HELDOUT, _TRAIN = "rows", "heldout", "train"

MODEL, ADAPTER = "model", "adapter"
"""folders of the result, and of the adapters that are merged in it"""

_NUM_LOOKED_AT = 64  # rows, for tokens that adapters cannot teach

_PROBE_TOKENS = 256  # on which the merged model is compared with the trained one


def make_payload(
    config: Config, student: Path, is_dense: bool, dense: Path, teacher: Path | None, form: str,
    writer: StageWriter, run_dir: Path,
) -> dict[str, Any]:  # fmt: skip
    """On the driver: what the tasks and workers of the stage are told.

    Args:
        config: with absolute paths.
        student: the model to train.
        is_dense: whether it is dense and stays so.
        dense: what the run compares with.
        teacher: dense fine-tuned model; None for none.
        form: of the records.
        writer, run_dir: of the stage.

    Raises:
        InputError: a token store does not fit the run, or no rotation that is known brings the
            teacher into the student's basis.
    """
    rotation = None
    if teacher is not None:
        weight = config.finetune.square_head_weight
        rotation = teacher_rotation(student, teacher, weight, is_tuned=True)
    scratch = writer.scratch
    store = checked_store(config, student) if form == TEXT else None
    return {
        "config": config, "student": student, "is_dense": is_dense, "dense": dense,
        "teacher": teacher, "rotation": rotation, "form": form, "folder": writer.folder,
        "scratch": scratch, "run_dir": run_dir, "store": store or scratch / _STORE,
        "heldout": None if config.finetune.heldout_every_steps is None else scratch / _HELDOUT,
        "adapter_from": _absolute(config.finetune.adapter_from),
    }  # fmt: skip


def _absolute(text: str | None) -> Path | None:
    return None if text is None else Path(text).absolute()


def prepare_rows(context: WorkerContext, payload: dict[str, Any]) -> None:
    """One task: records or text, and what is held out, as token stores in the scratch folder."""
    torch.set_num_threads(context.num_threads)
    config, form = payload["config"], payload["form"]
    tokenizer = load_tokenizer(payload["student"])
    length = config.data.sequence_length
    for key, source in (("store", config.data.train), ("heldout", config.finetune.heldout)):
        folder = payload[key]
        if folder is None or (folder / MANIFEST).is_file():
            continue
        with disk_errors(folder):
            if form != TEXT:
                rows, warnings = record_rows(config, tokenizer, source)
                write_rows(folder, {_TRAIN if key == "store" else key: rows}, tokenizer, length)
            elif key == "store":
                wanted = num_steps(_engine_config(config, None)) * config.finetune.batch_size
                rows, warning = load_rows(config.data, "train", tokenizer, wanted, config.run.seed)
                warnings = [warning] if warning else []
                write_rows(folder, {_TRAIN: rows}, tokenizer, length)
            else:
                warnings = write_heldout(_engine_config(config, None), tokenizer, folder)
        for line in warnings:
            context.warn(line)


def has_rows(payload: dict[str, Any]) -> bool:
    """Whether the stores that `prepare_rows` makes are there already."""
    stores = (payload["store"], payload["heldout"])
    return all((folder / MANIFEST).is_file() for folder in stores if folder is not None)


def record_rows(config: Config, tokenizer: Any, source: str) -> tuple[TokenRows, list[str]]:
    """The records of a source as packed rows, and what was left out of them.

    Raises:
        InputError: a record that is not what its form says, or that the template cannot render; or
            not one that fits into a row and has something to learn.
    """
    settings, remarks = config.finetune, Remarks()
    renderer = Renderer(tokenizer, template_of(tokenizer, settings.template))
    chats = Chats(source, settings.fields, config.data.text_field)
    examples = list(examples_of(chats, renderer, config.data.sequence_length, remarks))
    lines = [f"{source}: {line}" for line in remarks.lines()]
    if not examples:
        raise InputError(
            f"data source {source}: no record with something to learn fits into a row of "
            f"data.sequence_length={config.data.sequence_length} tokens ({'; '.join(lines)}); use "
            "longer rows"
        )
    filler = tokenizer.eos_token_id or 0
    return pack(examples, config.data.sequence_length, filler, settings.packing), lines


def finetune_on_worker(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any] | None:
    """On every worker: load, resume if there is a checkpoint, train, write.

    Returns:
        On rank 0 the figures of the run, else None.
    """
    store = TokenStore.open(payload["store"])
    config = _engine_config(payload["config"], store)
    if config.finetune.adapter != "none" and context.world_size == 1:
        # Alone there is nothing to split, and ZeRO would hold the adapters a second time.
        config.distill = replace(config.distill, zero_stage=0)
    recovery, student = train(context, config, payload, store)
    model, num_tokens, adapter = (
        recovery.engine.module.model,
        recovery.curve[-1]["num_tokens"],
        None,
    )
    if config.finetune.adapter == "none":
        state = gathered_state_dict(recovery.engine)
        if state is None:
            return None
    else:
        if context.rank:
            return None
        state = None
        model, adapter = _merged(payload, model, student.masks, store)
    _write(payload, model, state, student.masks, str(student.pattern), num_tokens)
    return {
        **figures_of(recovery),
        "adapter": adapter,
        "num_rows": len(store),
        "form": payload["form"],
    }


def _engine_config(config: Config, store: TokenStore | None) -> Config:
    """The config whose options of the engine are those of the fine-tuning.

    Args:
        config: of the stage.
        store: the rows, of which epochs are counted; None where tokens are.
    """
    settings, length = config.finetune, config.data.sequence_length
    num_tokens = settings.num_tokens
    if num_tokens is None:
        assert store is not None, "of text the tokens are said"
        steps = max(1, round(settings.epochs * len(store) / settings.batch_size))
        num_tokens = steps * settings.batch_size * length
    own = copy(config)
    own.distill = settings.training(num_tokens)
    return own


def train(
    context: WorkerContext, config: Config, payload: dict[str, Any], store: TokenStore
) -> tuple[Recovery, Student]:
    """Load, resume if there is a checkpoint, train to the end."""
    torch.set_num_threads(context.num_threads)
    torch.manual_seed(config.run.seed)
    pace = Pace(context, config.distill, payload["scratch"], config.data.sequence_length)
    with pace.interval(START):
        recovery, student = prepare(context, config, payload, store, pace)
        recovery.resume()
    recovery.train()
    return recovery, student


def prepare(
    context: WorkerContext, config: Config, payload: dict[str, Any], store: TokenStore, pace: Pace
) -> tuple[Recovery, Student]:
    """Model in its engine, any teacher in its place, rows: a training that has yet to start."""
    settings, make_engine = config.distill, build_engine
    if config.finetune.adapter == "none":
        split = Partitioner(settings, context.world_size, context.device == "cuda")
        student = load_student(
            payload["student"], payload["dense"], None, config, context, split, payload["is_dense"]
        )
        trained = student
    else:
        adapters = _adapters()
        student = adapters.load_adapted(
            payload["student"], payload["is_dense"], config, context, payload["adapter_from"]
        )
        trained = replace(student, masks=BitMasks({}, {}))  # what is frozen needs no guard
        if context.rank == 0:  # whose word is enough
            tokenizer = load_tokenizer(payload["student"])
            _warn_of_alike_tokens(context, config, student, tokenizer, store)
        if config.finetune.is_paged:
            make_engine = partial(build_engine, make_optimizer=adapters.PagedAdamW)
    teacher = None
    if payload["teacher"] is not None:
        teacher = load_teacher(
            payload["teacher"], settings, payload["rotation"], context, store.rows([0]),
            config.data.isolate_documents,
        )  # fmt: skip
    heldout = payload["heldout"] and Heldout(
        TokenStore.open(payload["heldout"]), context.rank, context.world_size,
        settings.micro_batch_size, context.device, teacher is not None,
    )  # fmt: skip
    recovery = build_recovery(
        context, config, trained, teacher, store, heldout, pace, payload["scratch"],
        payload["run_dir"], make_engine,
    )  # fmt: skip
    return recovery, student


def _warn_of_alike_tokens(
    context: WorkerContext, config: Config, student: Student, tokenizer: Any, store: TokenStore
) -> None:
    """Say which tokens of the first rows a model with a frozen head can hardly learn to write."""
    rows = store.rows(range(min(len(store), _NUM_LOOKED_AT)))
    learned = rows.ids_NT[:, 1:][rows.has_next_NT[:, :-1]].unique()
    weight_VD = student.head.linear.weight
    alike = alike_tokens(weight_VD, learned.to(weight_VD.device)).tolist()
    if alike:
        shown = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(alike[:5])))
        more = ", ..." if len(alike) > 5 else ""
        context.warn(
            f"finetune.adapter={config.finetune.adapter}: {len(alike)} of {len(learned)} tokens to "
            f"learn ({shown}{more}) have another token's row in the model's head, which adapters "
            "leave as it is: the model can hardly learn to write them; train all weights with "
            "finetune.adapter=none, or, if it is the end token, use a finetune.template whose "
            "answers end in one that the model knows"
        )


def _adapters() -> Any:
    from jobs.training import adapters  # needs packages of an extra

    return adapters


def _merged(
    payload: dict[str, Any], trained: Any, masks: BitMasks, store: TokenStore
) -> tuple[Any, dict[str, Any]]:
    """Write the adapters, merge them into the model that they were trained on; it, and figures."""
    adapting = _adapters()
    settings, base = payload["config"].finetune, payload["student"]
    adapters = adapters_of(trained)
    with disk_errors(payload["folder"]):
        adapting.write_adapters(payload["folder"] / ADAPTER, base, adapters, settings.rank)
    merge = adapting.merge_adapters(base, masks, adapters, settings)
    row = store.rows([0])
    row = TokenRows(row.ids_NT[:, :_PROBE_TOKENS], row.positions_NT[:, :_PROBE_TOKENS])
    device = next(trained.parameters()).device
    before = probe_logits(trained.eval(), row.to(device)).cpu()
    kl = float(forward_kl(probe_logits(merge.model, row), before))
    return merge.model, {
        "num_parameters": sum(p.numel() for one in adapters.values() for p in one.parameters()),
        "cut_share": merge.cut_share,
        "merge_kl": kl,
    }


def _write(
    payload: dict[str, Any], model: Any, state: dict[str, torch.Tensor] | None, masks: BitMasks,
    pattern: str, num_tokens: int,
) -> None:  # fmt: skip
    """Rank 0 writes the model, with the template that it was trained with."""
    folder, config = payload["folder"] / MODEL, payload["config"]
    before = read_sparsity(payload["student"]) or {}
    provenance = {
        "dense_path": str(payload["dense"].resolve()),
        "dense_sha256": model_fingerprint(payload["dense"]),
        **before.get("provenance", {}),
        "num_finetuning_tokens": num_tokens,
        "finetuned_from_sha256": model_fingerprint(payload["student"]),
    }
    tokenizer = load_tokenizer(payload["student"])
    if payload["form"] != TEXT:
        tokenizer.chat_template = template_of(tokenizer, config.finetune.template)
    with disk_errors(folder):
        save_model(model, tokenizer, folder, state)
        if payload["is_dense"]:
            return
        save_masks(folder / MASKS, masks)
        carry_rotation(payload["student"], folder)
        write_sparsity(folder, masks, pattern, before.get("method", "given"), provenance)


def check_result(folder: Path, is_dense: bool) -> dict[str, int]:
    """On the driver: whether every pruned weight of what was written is zero; its counts."""
    masks = ({}, Pattern.parse("2:4")) if is_dense else masks_of(folder)
    return check_files(folder, *masks)
