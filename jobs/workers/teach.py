"""Writing a teacher's samples shard by shard of a token store, continuing after an interruption.

Every row is drawn with a generator of its own, seeded by the seed and the row's number: any number
of workers and of interruptions gives the same bytes. Beside the files, `.teach/` holds a record of
each one that is whole; it goes when the manifest is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cluster.runtime.worker import WorkerContext
from conf.options.teach import TeachJobConfig
from jobs.runs.display import Display
from jobs.runs.folder import disk_errors
from jobs.runs.hub import model_folder
from jobs.workers.shards import MapShards, ShardFolder, fill_folder, write_record
from sparsify.data.order import key_of
from sparsify.data.rows import TokenRows
from sparsify.data.store import TokenStore, is_store
from sparsify.data.teacher_samples import (
    Sample,
    SampleFacts,
    SampleShard,
    TeacherSamples,
    facts_of,
    sample_name,
    write_sample_manifest,
    write_samples,
)
from sparsify.distillation.head_loss import Teacher
from sparsify.distillation.sampling import draw
from sparsify.errors import InputError
from sparsify.formats.sparse_folder import model_fingerprint
from sparsify.models.calls import run_model
from sparsify.models.isolation import check_isolation
from sparsify.models.lm_head import LanguageHead, check_head
from sparsify.models.load import (
    check_checkpoint,
    check_sequence_length,
    load_pair,
    load_tokenizer,
    read_config,
)
from sparsify.models.varlen import documents_of

STATE = ".teach"


@dataclass(frozen=True)
class TeachTask:
    """What a worker needs to make one file."""

    folder: Path
    model: Path
    store: Path
    shard: int
    """which of the store's"""
    facts: SampleFacts
    batch_size: int


def make_cache(config: TeachJobConfig) -> Path:
    """Fill the folder that the config names on its cluster; raises as `fill_folder`."""
    return fill_folder(
        "teach", config.teach.out, config.cluster, lambda *given: write_cache(config, *given)
    )


def write_cache(config: TeachJobConfig, out: Path, map_shards: MapShards, display: Display) -> None:
    """Sample what is not yet sampled, then write the manifest.

    Args:
        config: checked by its rules.
        out: the cache's folder; exists.
        map_shards: calls `work(context, payload)` for every payload, wherever.
        display: told what happens.

    Raises:
        InputError: the store or the model cannot be used, or the folder holds, whole or half-way, a
            cache of something else.
    """
    store = _open_store(config)
    model = model_folder("model.path", config.model.path)
    num_words = _check_model(model, store)
    facts = _facts(config, store, model_fingerprint(model), num_words)
    display.say(_size(store, facts))
    folder = ShardFolder(
        "teach", out, out / STATE, "teacher cache", asdict(facts), SampleShard, _contents
    )
    places = {sample_name(shard.file): place for place, shard in enumerate(store.shards)}

    def make(names: list[str]) -> None:
        rows, size = store.folder.absolute(), config.teach.batch_size
        map_shards(teach_shard, [TeachTask(out, model, rows, places[name], facts, size)
                                 for name in names])  # fmt: skip

    def finish(shards: dict[str, SampleShard]) -> None:
        write_sample_manifest(out, facts, list(shards.values()))

    folder.complete(list(places), make, finish, display)
    cache = TeacherSamples.open(out)
    num_tokens = len(cache) * facts.sequence_length
    display.finish_stage(
        "teach", f"{len(cache):,} rows, {num_tokens:,} tokens, digest {cache.digest[:12]}"
    )


def _contents(out: Path) -> tuple[Any, list[dict[str, Any]]]:
    manifest = TeacherSamples.read_manifest(out)
    return asdict(facts_of(manifest)), manifest["shards"]


def describe_plan(config: TeachJobConfig) -> list[str]:
    """What the command would do, in lines for a person; reads the store's manifest alone."""
    store = _open_store(config)
    return [
        f"teach: {config.cluster.num_workers} workers on {config.cluster.name}",
        f"  teacher: {config.model.path}, weights in {config.model.dtype}",
        f"  rows: {len(store):,} of {store.sequence_length} tokens, "
        f"{len(store.shards)} shards of {config.data.train}",
        f"  {_size(store, _facts(config, store, '', 0))}",
        f"  output: {config.teach.out}",
    ]


def _open_store(config: TeachJobConfig) -> TokenStore:
    train = config.data.train
    assert train is not None, "a rule of the config"
    if not is_store(train):
        raise InputError(
            f"data.train={train}: not a token store; make one of the text with "
            "python -m jobs.tokenize, which the recoveries then read too"
        )
    return TokenStore.open(train)


def _check_model(model: Path, store: TokenStore) -> int:
    """Find what is wrong with the model before anything is started; the size of its vocabulary."""
    check_checkpoint(model)
    model_config = read_config(model)
    check_sequence_length(model_config, store.sequence_length)
    store.check_tokenizer(load_tokenizer(model), str(model))
    return int(model_config.get_text_config().vocab_size)


def _facts(
    config: TeachJobConfig, store: TokenStore, teacher_sha256: str, num_words: int
) -> SampleFacts:
    teach = config.teach
    return SampleFacts(
        store.digest, teacher_sha256, config.model.dtype, teach.num_samples, teach.temperature,
        teach.flatness, teach.seed, config.data.isolate_documents, store.sequence_length,
        num_words,
    )  # fmt: skip


def _size(store: TokenStore, facts: SampleFacts) -> str:
    """What the cache takes."""
    total_gb = store.num_tokens * facts.token_bytes / 1e9
    return (
        f"size: {facts.token_bytes:,} bytes for each of {store.num_tokens:,} tokens, "
        f"{total_gb:,.3g} GB"
    )


def teach_shard(context: WorkerContext, task: TeachTask) -> dict[str, Any]:
    """Make one file and the record that says it is whole; the record."""
    torch.set_num_threads(context.num_threads)
    store = TokenStore.open(task.store)
    store.verify_shard(store.shards[task.shard])
    facts = task.facts
    teacher = _teacher(task.model, facts.dtype, context.device, facts.isolate_documents)
    rows = store.shard_rows(task.shard)
    path = task.folder / sample_name(store.shards[task.shard].file)
    samples = _samples(teacher, store, rows, task, context.device)
    with disk_errors(path):
        shard = write_samples(path, samples, len(rows), facts)
        write_record(task.folder / STATE, shard)
    return asdict(shard)


def _samples(
    teacher: LanguageHead, store: TokenStore, numbers: range, task: TeachTask, device: str
) -> Iterator[Sample]:
    """The sample of each row, the teacher's forward over `batch_size` of them at a time."""
    facts, head = task.facts, teacher.plain()
    for start in range(0, len(numbers), task.batch_size):
        batch = numbers[start : start + task.batch_size]
        rows = store.rows(batch)
        if not facts.isolate_documents:
            rows = TokenRows.whole(rows.ids_NT)
        rows = rows.to(device)
        with torch.no_grad():
            found = run_model(teacher.base, rows, **documents_of(teacher.base, rows))
            hidden_BTD = found.last_hidden_state
        for number, hidden_TD in zip(batch, hidden_BTD, strict=True):
            generator = torch.Generator(device).manual_seed(key_of("teach", facts.seed, number))
            yield draw(
                Teacher(hidden_TD, head), facts.num_samples, generator, facts.temperature,
                facts.flatness,
            )  # fmt: skip


@cache
def _teacher(model: Path, dtype: str, device: str, isolates: bool) -> LanguageHead:
    """The model in its two parts, loaded once in the life of a worker."""
    teacher, _ = load_pair(model, dtype, device)
    teacher.requires_grad_(False)
    if isolates:
        check_isolation(teacher)
    return check_head(teacher)
