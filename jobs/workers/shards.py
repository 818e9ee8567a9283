"""A folder of files that are made one by one, by any worker, and a manifest that comes last.

While files are missing, a folder of state inside says what they are made from and has a record of
each one that is whole, so that the same command continues and another one is refused. The state
goes when the manifest is written.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.executor import Executor
from cluster.preempt import telling
from cluster.spec import ClusterSpec
from jobs.runs.artifact import differences
from jobs.runs.display import Display
from jobs.runs.folder import disk_errors, prepare_run_dir, read_json, run_lock, write_json
from jobs.runs.session import cluster_errors, new_cluster
from sparsify.data.shards import MANIFEST, is_whole
from sparsify.data.store import Shard
from sparsify.data.teacher_samples import SampleShard
from sparsify.errors import InputError

MapShards = Callable[[Callable[..., Any], list[Any]], None]
"""calls `work(context, payload)` for every payload, wherever"""

_BEGUN = "begun.json"

_RECORD = ".shard.json"


def fill_folder(
    command: str, out: str, spec: ClusterSpec, write: Callable[[Path, MapShards, Display], None]
) -> Path:
    """Have `write` fill the folder that the option `<command>.out` names, held by this process.

    Args:
        command: its name.
        out: the folder.
        spec: of the cluster, which is started when there are shards to make.
        write: gets the absolute folder, a way to map work over the cluster, and the display.

    Returns:
        The folder.

    Raises:
        InputError: something the user can put right.
        TwofourError: a shard could not be made; finished ones are kept.
    """
    folder, option = Path(out).absolute(), f"{command}.out"
    prepare_run_dir(folder, option)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_lock(folder, option))
        display = stack.enter_context(Display())

        cluster: Executor | None = None

        def map_shards(work: Callable[..., Any], payloads: list[Any]) -> None:
            nonlocal cluster
            with cluster_errors():
                if cluster is None:  # one for all calls
                    new = new_cluster(spec, f"{command} {folder.name}", display.on_event)
                    cluster = stack.enter_context(new)
                cluster.run_tasks(command, work, payloads, "shards")

        def so_far() -> str:
            reached = display.reached(command)
            return f"in {command}{reached}; run the same command again: files that are whole stay"

        with disk_errors(folder), telling(so_far):
            display.start_stage(command)
            write(folder, map_shards, display)
    return folder


@dataclass(frozen=True)
class ShardFolder:
    """What a command makes of shards, whole or half-way."""

    command: str
    out: Path
    """exists"""
    state: Path
    """the folder inside that is there while shards are missing"""
    kind: str
    """what it is, in a word"""
    settings: dict[str, Any]
    """what decides every byte; plain values without paths"""
    facts_type: type[Shard] | type[SampleShard]
    """facts of one shard"""
    read: Callable[[Path], tuple[Any, list[dict[str, Any]]]]
    """of a folder with a manifest: the settings it was made with, and its shards' records"""

    def complete(
        self, names: Sequence[str], make: Callable[[list[str]], None],
        finish: Callable[[dict[str, Any]], None], display: Display,
    ) -> None:  # fmt: skip
        """Make the shards that are missing, then what comes last.

        Args:
            names: files of all shards, in order.
            make: makes those of the names that it gets; leaves a record of each.
            finish: writes the manifest, from name -> facts of every shard.
            display: told how many shards are whole.

        Raises:
            InputError: the folder, whole or half-way, was made from something else, or holds other
                files.
        """
        done = self._whole_shards()
        missing = [name for name in names if name not in done]
        if missing or not (self.out / MANIFEST).is_file():
            self.state.mkdir(exist_ok=True)
            for facts in done.values():
                write_record(self.state, facts)
            write_json(self.state / _BEGUN, self.settings)
            (self.out / MANIFEST).unlink(missing_ok=True)
            if done:
                display.say(f"{self.command}: {len(done)} shards are whole, {len(missing)} to make")
            if missing:
                make(missing)
            paths = {name: self.state / f"{name}{_RECORD}" for name in names}
            finish({name: self.facts_type(**_json(path)) for name, path in paths.items()})
        shutil.rmtree(self.state, ignore_errors=True)

    def _whole_shards(self) -> dict[str, Any]:
        """Name -> facts of every shard that is whole, its hash checked."""
        begun = self.state / _BEGUN
        if (self.out / MANIFEST).is_file():
            settings, records = self.read(self.out)
            self._require_same(settings, f"the {self.kind}")
        else:
            if begun.is_file():
                self._require_same(_json(begun), f"the interrupted {self.kind}")
            elif any(self.out.glob("[!.]*")):
                raise InputError(
                    f"{self.command}.out={self.out}: holds other files and no {self.kind}; choose "
                    "an empty folder"
                )
            records = [_json(path) for path in sorted(self.state.glob(f"*{_RECORD}"))]
        shards = [self.facts_type(**record) for record in records]
        return {shard.file: shard for shard in shards if is_whole(self.out, shard)}

    def _require_same(self, old: Any, what: str) -> None:
        if changes := differences(old, self.settings):
            raise InputError(
                f"{self.command}.out={self.out}: {what} was made from something else "
                f"({'; '.join(changes)}); use another {self.command}.out=, go back to the old "
                "values, or remove the folder"
            )


def write_record(state: Path, facts: Shard | SampleShard) -> None:
    """Note that a shard is whole."""
    write_json(state / f"{facts.file}{_RECORD}", asdict(facts))


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, f"remove {path.parent.parent} to start over")
