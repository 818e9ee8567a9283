"""Writing a teacher's samples shard by shard of a token store, and going on after an interruption.

Every row is drawn with a generator of its own, seeded by the seed and the row's number: any number
of workers and of interruptions gives the same bytes. Beside the files, `.teach/` holds a record of
each one that is whole; it goes when the manifest is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runs.folder import disk_errors
from jobs.workers.shards import begin, begun_records, read_record, require_same, write_record
from sparsify.data.order import key_of
from sparsify.data.shards import MANIFEST, is_whole
from sparsify.data.store import TokenStore, is_store
from sparsify.data.teacher_samples import (
    SampleFacts,
    SampleShard,
    TeacherSamples,
    facts_of,
    sample_name,
    write_sample_manifest,
    write_samples,
)
from sparsify.errors import InputError
from sparsify.formats.sparse_folder import model_fingerprint

if TYPE_CHECKING:
    from cluster.runtime.backend import WorkerContext
    from conf.options.teach import TeachJobConfig
    from jobs.runs.display import Display
    from sparsify.data.teacher_samples import Sample
    from sparsify.models.lm_head import LanguageHead

MapShards = Callable[[Callable[..., Any], list[Any]], None]

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


def write_cache(config: TeachJobConfig, out: Path, map_shards: MapShards, display: Display) -> None:
    """Sample what is not yet sampled, then write the manifest.

    Args:
        config: checked by its rules.
        out: the cache's folder; exists.
        map_shards: calls `work(context, payload)` for every payload, wherever.
        display: told what happens.

    Raises:
        InputError: the store or the model cannot be used, or the folder holds, whole or begun, a
            cache of something else.
    """
    from sparsify.models.load import resolve_path

    display.start_stage("teach")
    store = _open_store(config)
    model = resolve_path(config.model.path).absolute()
    num_words = _check_model(model, store)
    facts = _facts(config, store, model_fingerprint(model), num_words)
    display.say(_size(store, facts))
    settings, state = asdict(facts), out / STATE
    done = _finished_files(out, settings)
    names = [sample_name(shard.file) for shard in store.shards]
    missing = [index for index, name in enumerate(names) if name not in done]
    if missing or not (out / MANIFEST).is_file():
        begin(out, state, settings, [asdict(shard) for shard in done.values()])
        folder, size = store.folder.absolute(), config.teach.batch_size
        tasks = [TeachTask(out, model, folder, index, facts, size) for index in missing]
        if done:
            display.say(f"teach: {len(done)} files are whole, {len(tasks)} to make")
        if tasks:
            map_shards(teach_shard, tasks)
        shards = [SampleShard(**read_record(state, name)) for name in names]
        write_sample_manifest(out, facts, shards)
    shutil.rmtree(state, ignore_errors=True)
    cache = TeacherSamples.open(out)
    num_tokens = len(cache) * facts.sequence_length
    display.finish_stage(
        "teach", f"{len(cache):,} rows, {num_tokens:,} tokens, digest {cache.digest[:12]}"
    )


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
    from sparsify.models.load import (
        check_checkpoint,
        check_sequence_length,
        load_tokenizer,
        read_config,
    )

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


def _finished_files(out: Path, settings: dict[str, Any]) -> dict[str, SampleShard]:
    """Name -> facts of every file that is whole, its hash checked.

    Raises:
        InputError: the folder's cache, whole or begun, was made from something else.
    """
    if (out / MANIFEST).is_file():
        manifest = TeacherSamples.read_manifest(out)
        require_same("teach.out", out, asdict(facts_of(manifest)), settings, "the cache")
        records = manifest["shards"]
    else:
        records = begun_records("teach.out", out, out / STATE, settings, "teacher cache")
    shards = [SampleShard(**record) for record in records]
    return {shard.file: shard for shard in shards if is_whole(out, shard)}


def teach_shard(context: WorkerContext, task: TeachTask) -> dict[str, Any]:
    """Make one file and the record that says it is whole; the record."""
    import torch

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
        write_record(task.folder / STATE, asdict(shard))
    return asdict(shard)


def _samples(
    teacher: LanguageHead, store: TokenStore, numbers: range, task: TeachTask, device: str
) -> Iterator[Sample]:
    """The sample of each row, the teacher's forward over `batch_size` of them at a time."""
    import torch

    from sparsify.data.rows import TokenRows
    from sparsify.distillation.head_loss import Teacher
    from sparsify.distillation.sampling import draw

    facts, head = task.facts, teacher.plain()
    for start in range(0, len(numbers), task.batch_size):
        batch = numbers[start : start + task.batch_size]
        rows = store.rows(batch)
        if not facts.isolate_documents:
            rows = TokenRows.whole(rows.ids_NT)
        rows = rows.to(device)
        with torch.no_grad():
            hidden_BTD = teacher.base(
                input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False
            ).last_hidden_state
        for number, hidden_TD in zip(batch, hidden_BTD, strict=True):
            generator = torch.Generator(device).manual_seed(key_of("teach", facts.seed, number))
            yield draw(
                Teacher(hidden_TD, head), facts.num_samples, generator, facts.temperature,
                facts.flatness,
            )  # fmt: skip


@cache
def _teacher(model: Path, dtype: str, device: str, isolates: bool) -> LanguageHead:
    """The model in its two parts, loaded once in the life of a worker."""
    from sparsify.models.isolation import check_isolation
    from sparsify.models.lm_head import check_head
    from sparsify.models.load import load_pair

    teacher, _ = load_pair(model, dtype, device)
    teacher.requires_grad_(False)
    if isolates:
        check_isolation(teacher)
    return check_head(teacher)
