"""A corpus made better: judged shard by shard, copies found, mixed, and written shard by shard.

Three steps, each of which continues where it was: shards are judged by any worker, the driver finds
copies and chooses, shards are written by any worker. How sources are cut depends on them and on
`curate.shard_bytes` alone, and what a shard gives on its text and the settings alone: any number of
workers and of interruptions gives the same bytes. `curation.json` comes last and makes it whole.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from conf.options.curate import CurateConfig, CurateJobConfig, shares_of
from conf.options.data import DataConfig
from conf.schema import to_dict
from jobs.corpus.builtin import BUILT_IN
from jobs.corpus.documents import Remarks
from jobs.corpus.places import absolute_name
from jobs.corpus.raw_records import cut_records, read_records, source_digest
from jobs.corpus.sources import source_label
from jobs.curation.fields import all_strings
from jobs.curation.filters import make_judges
from jobs.curation.overlap import Against, collect
from jobs.runs.artifact import differences
from jobs.runs.display import Display
from jobs.runs.folder import read_json, write_json
from jobs.workers.curate_choice import Choice, choose
from jobs.workers.curate_shards import (
    Judged,
    JudgeTask,
    Shard,
    WriteTask,
    is_judged,
    judge_shard,
    save_against,
    write_shard,
)
from jobs.workers.shards import MapShards, fill_folder
from sparsify.errors import InputError
from sparsify.files import file_sha256, written_whole

RECORD = "curation.json"

DATA = "data"

STATE = ".curate"

_BEGUN = "begun.json"

_VERSION = 1  # of what the same settings give

_CHOOSING = ("exact", "mixing", "unit", "total", "when_short", "format")
"""options that concern no shard's judgement, so that an unfinished corpus may change them"""


def make_corpus(config: CurateJobConfig) -> Path:
    """Fill the folder that the config names on its cluster; raises as `fill_folder`."""
    return fill_folder(
        "curate", config.curate.out, config.cluster, lambda *given: write_corpus(config, *given)
    )


def check(config: CurateJobConfig) -> list[tuple[str, int]]:
    """(source, shards) of every source: what a command can refuse before it starts.

    Raises:
        InputError: no source, or one that cannot be read; unknown rules, limits or languages.
    """
    if not config.curate.sources:
        raise InputError(
            "curate.sources: is empty; give texts, for example 'curate.sources=[corpus.jsonl]'"
        )
    make_judges(config.curate, None)
    config = _absolute(config)
    return [(source_label(name), len(shards)) for name, shards in _cut(config)]


def write_corpus(
    config: CurateJobConfig, out: Path, map_shards: MapShards, display: Display
) -> None:
    """Do what is not yet done, then write `curation.json`.

    Args:
        config: checked by its rules.
        out: the folder; exists.
        map_shards: calls `work(context, payload)` for every payload, wherever.
        display: told what happens.

    Raises:
        InputError: a source cannot be read, nothing is left, or the folder holds, whole or
            half-way, something else.
    """
    check(config)
    config = _absolute(config)
    remarks = Remarks()
    settings = _settings(config, remarks)
    for line in remarks.lines():
        display.say(line)
    if _is_finished(out, settings):
        display.finish_stage("curate", "whole already, nothing to do")
        return
    state = _begin(out, settings)
    shards = [
        Shard(f"{number:03d}-{index:05d}", number, parts)
        for number, (_, cut) in enumerate(_cut(config))
        for index, parts in enumerate(cut)
    ]
    warnings = _judge(config, state, shards, map_shards, display)
    labels = [source_label(name) for _, name in shares_of(config.curate)]
    judged = [Judged(state / "judged" / shard.name) for shard in shards]
    try:
        choice = choose(config, shards, judged, labels, state)
    except InputError:
        if not any(one.num_left for one in judged):
            shutil.rmtree(state)  # nobody wants to continue from nothing
        raise
    files = _write(config, out, state, shards, choice, map_shards, display)
    record = {
        "schema": 1, "settings": settings, **asdict(choice.report), "files": files,
        "warnings": warnings,
    }  # fmt: skip
    write_json(out / RECORD, record)
    shutil.rmtree(state, ignore_errors=True)
    display.finish_stage("curate", f"{sum(f['documents'] for f in files):,} documents are kept")


def _absolute(config: CurateJobConfig) -> CurateJobConfig:
    """Sources by paths that workers find too."""
    curate = config.curate
    is_mix = curate.mixing == "proportions"
    has_shares = is_mix or any(share != 1.0 for share, _ in shares_of(curate))
    sources = [(share, absolute_name(name, BUILT_IN)) for share, name in shares_of(curate)]
    return replace(
        config,
        curate=replace(
            curate,
            sources=[f"{share!r} {name}" if has_shares else name for share, name in sources],
            against=[absolute_name(name, BUILT_IN) for name in curate.against],
        ),
    )


def _cut(config: CurateJobConfig) -> list[tuple[str, Any]]:
    """(source, its shards) of every source."""
    size = config.curate.shard_bytes
    return [(name, cut_records(name, config.data, size)) for _, name in shares_of(config.curate)]


def _settings(config: CurateJobConfig, remarks: Remarks) -> dict[str, Any]:
    """What decides every byte; plain values without paths: first what decides judgements."""
    curate = config.curate
    options = to_dict(curate)
    for name in ("out", "sources", "against"):
        options.pop(name)
    choosing = {name: options.pop(name) for name in _CHOOSING}
    named = shares_of(curate)

    def described(name: str) -> dict[str, Any]:
        digest = source_digest(name, config.data, remarks)
        return {"name": source_label(name), "digest": digest}

    return {
        "judging": {
            **options,
            "version": _VERSION,
            "separator": config.data.separator,
            "sources": [described(name) for _, name in named],
            "against": [described(name) for name in curate.against],
        },
        "choosing": {**choosing, "shares": [share for share, _ in named]},
    }


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the whole result of these settings.

    Raises:
        InputError: it holds that of others.
    """
    path = out / RECORD
    if not path.is_file():
        return False
    record = read_json(path, f"remove {out} to start over")
    _require_same(out, record.get("settings"), settings, "the corpus")
    return all(_is_whole(out / DATA, facts) for facts in record["files"])


def _require_same(out: Path, old: Any, new: Any, what: str) -> None:
    if changes := differences(old, new):
        raise InputError(
            f"curate.out={out}: {what} was made from something else ({'; '.join(changes)}); use "
            "another curate.out=, go back to the old values, or remove the folder"
        )


def _is_whole(folder: Path, facts: dict[str, Any]) -> bool:
    path = folder / facts["file"]
    is_there = path.is_file() and path.stat().st_size == facts["bytes"]
    return is_there and file_sha256(path) == facts["sha256"]


def _begin(out: Path, settings: dict[str, Any]) -> Path:
    """The folder of state, fit for these settings.

    Raises:
        InputError: the output folder holds other files, or what was begun with other settings.
    """
    state = out / STATE
    begun = state / _BEGUN
    if begun.is_file():
        old = read_json(begun, f"remove {out} to start over")
        _require_same(out, old.get("judging"), settings["judging"], "the interrupted corpus")
        if old != settings:  # chosen in another way: what is judged stays
            shutil.rmtree(state / "written", ignore_errors=True)
            shutil.rmtree(out / DATA, ignore_errors=True)
    elif any(path.name not in (RECORD, "report.html", DATA) for path in out.glob("[!.]*")) or (
        (out / DATA).exists() and not (out / RECORD).is_file()
    ):
        raise InputError(
            f"curate.out={out}: holds other files and no corpus of jobs.curate; choose an empty "
            "folder"
        )
    for name in ("judged", "written", "chosen"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (out / DATA).mkdir(exist_ok=True)
    write_json(begun, settings)
    (out / RECORD).unlink(missing_ok=True)
    return state


def _judge(
    config: CurateJobConfig, state: Path, shards: list[Shard], map_shards: MapShards,
    display: Display,
) -> list[str]:  # fmt: skip
    """Have every shard judged that is not; what is to be said of the evaluation texts."""
    missing = [s for s in shards if not is_judged(state / "judged" / s.name)]
    if len(missing) < len(shards):
        done = len(shards) - len(missing)
        display.say(f"curate: {done} shards are judged, {len(missing)} to judge")
    path, warnings = None, []
    if config.curate.against:
        against = read_against(config.curate, config.data)
        path = state / "against.npz"
        save_against(path, against)
        if against.num_short:
            warnings.append(
                f"curate.against: {against.num_short:,} texts are too short to be looked for"
            )
    if missing:
        folder = state / "judged"
        map_shards(
            judge_shard, [JudgeTask(folder, s, config.curate, config.data, path) for s in missing]
        )
    return warnings


def read_against(config: CurateConfig, data: DataConfig) -> Against:
    """The n-grams of every string in the records of curate.against.

    Raises:
        InputError: a source cannot be read, or none has a text that is long enough.
    """
    texts = (
        (number, text)
        for number, name in enumerate(config.against)
        for parts in cut_records(name, data, config.shard_bytes)
        for part in parts
        for _, record in read_records(part, data)
        for text in all_strings(record)
    )
    against = collect(texts, config.against_words)
    if not against.grams:
        raise InputError(
            f"curate.against={config.against[0]}: no text in it is long enough to be looked for; "
            "lower curate.against_words"
        )
    return against


def _write(
    config: CurateJobConfig, out: Path, state: Path, shards: list[Shard], choice: Choice,
    map_shards: MapShards, display: Display,
) -> list[dict[str, Any]]:  # fmt: skip
    """Have every shard written that is not; facts of all files, in order."""
    display.say(
        f"curate: {choice.report.result['documents']:,} of "
        f"{sum(s['documents'] for s in choice.report.sources):,} documents are kept"
    )
    records = {shard.name: state / "written" / f"{shard.name}.json" for shard in shards}
    tasks = []
    for shard, chosen_N2 in zip(shards, choice.chosen, strict=True):
        if not len(chosen_N2) or _is_written(out / DATA, records[shard.name]):
            continue
        path = state / "chosen" / f"{shard.name}.npy"
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.save(file, chosen_N2, allow_pickle=False)
        tasks.append(
            WriteTask(state / "written", out / DATA, shard, config.curate, config.data, path)
        )
    if tasks:
        map_shards(write_shard, tasks)
    files = [
        facts
        for shard, chosen_N2 in zip(shards, choice.chosen, strict=True)
        if len(chosen_N2)
        for facts in _written(records[shard.name])
    ]
    for path in set((out / DATA).glob("[!.]*")) - {out / DATA / str(f["file"]) for f in files}:
        path.unlink()  # of an earlier choice
    return files


def _written(record: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(record, "run the same command again")["files"]
    return found


def _is_written(folder: Path, record: Path) -> bool:
    return record.is_file() and all(_is_whole(folder, facts) for facts in _written(record))
