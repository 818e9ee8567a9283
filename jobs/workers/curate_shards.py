"""Curation on workers: a shard judged, and later written; each leaves whole files or none.

A shard is judged into a folder of arrays (what is left of it, in order: numbers of records, sizes,
digests, MinHash keys and sets) and `facts.json` (what was dropped, and why). Both tasks read the
source itself, so that no text is kept twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.runtime.worker import WorkerContext
from conf.options.curate import CurateConfig
from conf.options.data import DataConfig
from jobs.corpus.raw_records import RecordPart, read_records, table_schema
from jobs.corpus.records import has_halves, whole_characters
from jobs.corpus.tables import arrow
from jobs.corpus.turns import conversation_of, has_answer
from jobs.curation.fields import record_text
from jobs.curation.filters import make_judges
from jobs.curation.grams import shingles
from jobs.curation.minhash import MinHash
from jobs.curation.overlap import Against
from jobs.curation.text import Text
from jobs.runs.folder import read_json, write_json
from sparsify.errors import InputError, first_line
from sparsify.files import file_sha256, fsync, written_whole

EXAMPLE_CHARS = 600

EMPTY = "empty"

NO_ANSWER = "no answer"

_AS_MESSAGES = "curate.as_messages=true"

_FACTS = "facts.json"


@dataclass(frozen=True)
class Shard:
    """A piece of a source."""

    name: str
    source: int
    """its place in curate.sources"""
    parts: list[RecordPart]


@dataclass(frozen=True)
class JudgeTask:
    """What a worker needs to judge a shard."""

    folder: Path
    """that gets a folder of the shard's name"""
    shard: Shard
    config: CurateConfig
    data: DataConfig
    against: Path | None
    """n-grams of evaluation texts"""


@dataclass(frozen=True)
class WriteTask:
    """What a worker needs to write a shard."""

    state: Path
    """that gets a record of what is written"""
    out: Path
    shard: Shard
    config: CurateConfig
    data: DataConfig
    chosen: Path
    """int64 (N, 2): numbers of records, ascending, and how often each is written"""


class Judged:
    """A shard's folder; arrays are mapped, not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = read_json(folder / _FACTS, "remove the folder and run the same command again")
        self.num_left = int(self.facts["num_left"])

    def array(self, name: str) -> NDArray[Any]:
        """One of records_N (int64: number, characters, words), digests, keys, ends and sets."""
        found: NDArray[Any] = np.load(self.folder / f"{name}.npy", "r", allow_pickle=False)
        return found

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """int64 (N,): where in `sets` each document's ends."""
        return np.array(self.array("ends"))

    @cached_property
    def sets(self) -> NDArray[Any]:
        """Sets or signatures, one document after another."""
        return self.array("sets")

    def set_of(self, index: int) -> NDArray[Any]:
        """That of one of the documents that are left."""
        begin = self.ends[index - 1] if index else 0
        return self.sets[begin : self.ends[index]]


def is_judged(folder: Path) -> bool:
    """Whether a shard's folder is whole: it takes its name when it is."""
    return (folder / _FACTS).is_file()


@dataclass
class _Kept:
    """What is gathered of the documents that are left."""

    records: list[tuple[int, int, int]] = field(default_factory=list)
    digests: list[tuple[int, int]] = field(default_factory=list)
    keys: list[NDArray[np.uint64]] = field(default_factory=list)
    sets: list[NDArray[Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        ends = np.cumsum([len(one) for one in self.sets], dtype=np.int64)
        arrays: dict[str, NDArray[Any]] = {
            "records": np.array(self.records, np.int64).reshape(-1, 3),
            "digests": np.array(self.digests, np.uint64).reshape(-1, 2),
        }
        if self.sets:
            arrays |= {
                "keys": np.stack(self.keys, 1), "ends": ends, "sets": np.concatenate(self.sets),
            }  # fmt: skip
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
            fsync(folder / f"{name}.npy")


def judge_shard(context: WorkerContext, task: JudgeTask) -> None:
    """Read a shard's records and leave what is known of them in its folder."""
    config, kept = task.config, _Kept()
    judges = make_judges(config, None if task.against is None else _load_against(task.against))
    hashing = MinHash(config.num_hashes, config.near, config.seed) if config.near else None
    dropped: dict[str, dict[str, Any]] = {}
    totals = [0, 0, 0]
    for number, (place, record, text) in enumerate(shard_texts(task.shard, config, task.data)):
        num_words, reason, detail = len(text.words), None, ""
        for total, value in enumerate((1, len(text.text), num_words)):
            totals[total] += value
        if not text.text.strip():
            reason, detail = EMPTY, "no text in its fields"
        elif config.as_messages and not has_answer(conversation_of(record, place, _AS_MESSAGES)):
            reason, detail = NO_ANSWER, "nothing that the assistant says"
        else:
            for name, judge in judges:
                if (drop := judge(text)) is not None:
                    reason, detail = f"{name}.{drop.rule}", drop.detail
                    break
        if reason is not None:
            facts = dropped.setdefault(reason, {"documents": 0, "characters": 0, "examples": []})
            facts["documents"] += 1
            facts["characters"] += len(text.text)
            if len(facts["examples"]) < config.num_examples:
                facts["examples"].append({**example(place, text.text), "detail": detail})
            continue
        kept.records.append((number, len(text.text), num_words))
        kept.digests.append(text.digest)
        if hashing is not None:
            grams = shingles(text)
            signature_K = hashing.signature(grams)
            kept.keys.append(hashing.band_keys(signature_K))
            kept.sets.append(grams if config.verify == "exact" else signature_K)
    folder = task.folder / task.shard.name
    with written_whole(folder) as temporary:
        temporary.mkdir()
        kept.write(temporary)
        names = ("documents", "characters", "words")
        totals_by_name = dict(zip(names, totals, strict=True))
        write_json(
            temporary / _FACTS,
            {"num_left": len(kept.records), "dropped": dropped, **totals_by_name},
        )


def shard_texts(
    shard: Shard, config: CurateConfig, data: DataConfig
) -> Iterator[tuple[str, dict[str, Any], Text]]:
    """(place, record, its text) of every record of a shard, in order."""
    for part in shard.parts:
        for place, record in read_records(part, data):
            text = record_text(record, config.fields, place)
            yield place, record, Text(whole_characters(text))


def example(place: str, text: str) -> dict[str, str]:
    """A document for the report: where it is, and how it begins."""
    shown = text if len(text) <= EXAMPLE_CHARS else f"{text[:EXAMPLE_CHARS]} ..."
    head, _, inner = place.removeprefix("data source ").rpartition("/")
    return {"place": inner if head else place.removeprefix("data source "), "text": shown}


def save_against(path: Path, against: Against) -> None:
    """Write n-grams of evaluation texts for `judge_shard`."""
    arrays: dict[str, Any] = {}
    for size, (hashes, sources) in against.grams.items():
        arrays |= {f"{size}": hashes, f"{size} of": sources}
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


@cache
def _load_against(path: Path) -> Against:
    with np.load(path, allow_pickle=False) as arrays:
        sizes = sorted((int(name) for name in arrays if name.isdigit()), reverse=True)
        return Against({n: (arrays[f"{n}"], arrays[f"{n} of"]) for n in sizes}, 0)


# --- writing ---------------------------------------------------------------------------------


def write_shard(context: WorkerContext, task: WriteTask) -> None:
    """Write the chosen records of a shard, those that come again into files of their own."""
    chosen_N2 = np.load(task.chosen, allow_pickle=False)
    counts = dict(chosen_N2.tolist())
    files = []
    for turn in range(int(chosen_N2[:, 1].max(initial=0))):
        numbers = {number for number, count in counts.items() if count > turn}
        name = f"{f'again-{turn}-' if turn else ''}{task.shard.name}.{task.config.format}"
        records = _chosen_records(task, numbers)
        with written_whole(task.out / name) as temporary:
            write = _write_jsonl if task.config.format == "jsonl" else _write_parquet
            write(temporary, records, [] if task.config.as_messages else task.shard.parts)
        path = task.out / name
        facts = {"file": name, "documents": len(numbers), "bytes": path.stat().st_size}
        files.append({**facts, "sha256": file_sha256(path)})
    write_json(task.state / f"{task.shard.name}.json", {"files": files})


def _chosen_records(task: WriteTask, numbers: set[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    every = (found for part in task.shard.parts for found in read_records(part, task.data))
    for number, (place, record) in enumerate(every):
        if number not in numbers:
            continue
        if task.config.as_messages:
            record = {"messages": conversation_of(record, place, _AS_MESSAGES)}
        yield place, record


def _write_jsonl(
    path: Path, records: Iterator[tuple[str, dict[str, Any]]], parts: Sequence[RecordPart]
) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for place, record in records:
            try:
                line = json.dumps(record, ensure_ascii=False)
            except TypeError as error:
                raise InputError(
                    f"{place}: {error}, so that JSON cannot hold it; set curate.format=parquet"
                ) from None
            # Half of a surrogate pair has no form in UTF-8, but one as an escape.
            file.write((json.dumps(record) if has_halves(line) else line) + "\n")


def _write_parquet(
    path: Path, records: Iterator[tuple[str, dict[str, Any]]], parts: Sequence[RecordPart]
) -> None:
    """Of `parts`, those whose columns the records still have, come the types of these columns."""
    pyarrow = arrow()
    found = list(records)
    rows = [record for _, record in found]
    schemas = [table_schema(part) for part in parts]
    try:
        if (
            schemas
            and schemas[0] is not None
            and all(schema == schemas[0] for schema in schemas[1:])
        ):
            table = pyarrow.Table.from_pylist(rows, schema=schemas[0])
        else:
            names = list(dict.fromkeys(name for row in rows for name in row))
            table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        pyarrow.parquet.write_table(table, path)
    except (pyarrow.ArrowException, UnicodeEncodeError) as error:
        raise InputError(
            f"{found[0][0]}: this record and those after it do not fit columns, which "
            f"curate.format=parquet has ({first_line(error)}); set curate.format=jsonl"
        ) from None
