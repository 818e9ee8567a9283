"""Training state in pieces: a checkpoint that any number of workers can write and any other read.

A fragment is a run of consecutive elements of one copy (float32 weights, first or second moment) of
one parameter. Every worker writes the fragments it holds to one file; a reader puts together the
elements it wants from whatever files hold them, so the number of workers and the way ZeRO cuts the
parameters may change from one run to the next, and no element passes through another dtype.

A checkpoint is a folder with one safetensors file per worker, the masks, `state.json`, and a
manifest with the size and SHA-256 of each of them. `committed`, written last, holds the SHA-256 of
the manifest: a folder without it, or with a file that is not as the manifest says, is none.
"""

from __future__ import annotations

import bisect
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparsify.errors import CorruptCheckpointError
from sparsify.files import file_sha256, write_json, written_whole
from sparsify.tensors import tensor_names, write_tensors

FORMAT = "twofour-checkpoint-1"

MANIFEST, COMMITTED, STATE = "manifest.json", "committed", "state.json"


@dataclass(frozen=True, eq=False)
class Fragment:
    """Some consecutive elements of one copy of a parameter."""

    copy: str
    """which copy: "weights", "exp_avg" or "exp_avg_sq" """
    name: str
    """the parameter's name in the model"""
    start: int
    """index of the first element in the flattened parameter"""
    values: torch.Tensor
    """float32 (n,), n > 0"""

    @property
    def key(self) -> str:
        """Name of the fragment's tensor in its file."""
        return f"{self.copy}:{self.name}@{self.start}"


@dataclass(frozen=True)
class FileFacts:
    """What the manifest knows of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """Read `path` whole and sum it up."""
        return cls(path.stat().st_size, file_sha256(path))


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> None:
    """Write one worker's fragments as one safetensors file, whole or not at all."""
    tensors = {fragment.key: fragment.values for fragment in fragments}
    write_tensors(path, tensors, {"format": FORMAT})


def commit(folder: Path, facts: dict[str, FileFacts], state: dict[str, Any]) -> None:
    """Write state, manifest and, last, the mark that makes the folder a checkpoint.

    Args:
        folder: holds the files of all workers already.
        facts: of those files, by name.
        state: what else a resumed run needs; JSON.
    """
    write_json(folder / STATE, state)
    facts = {**facts, STATE: FileFacts.of(folder / STATE)}
    files = {name: asdict(facts[name]) for name in sorted(facts)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})
    with written_whole(folder / COMMITTED) as mark:
        mark.write_bytes(FileFacts.of(folder / MANIFEST).sha256.encode())


class Checkpoint:
    """A committed checkpoint, opened for reading.

    Args:
        folder: what `commit` finished.

    Raises:
        CorruptCheckpointError: not committed, or a file is missing or of another size; what the
            files hold is looked at by `verify`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._manifest()
        for name, facts in self._files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != facts.bytes:
                found = "missing" if size is None else f"{size:,} bytes"
                raise CorruptCheckpointError(f"{path}: {found}, written as {facts.bytes:,} bytes")
        self._places: dict[tuple[str, str], list[tuple[int, int, str]]] | None = None

    def _manifest(self) -> dict[str, FileFacts]:
        mark, path = self.folder / COMMITTED, self.folder / MANIFEST
        if not mark.is_file():
            raise CorruptCheckpointError(f"{self.folder}: not finished ({COMMITTED} is missing)")
        if not path.is_file() or FileFacts.of(path).sha256.encode() != mark.read_bytes():
            raise CorruptCheckpointError(f"{path}: missing, or not as it was when it was committed")
        manifest = json.loads(path.read_text("utf-8"))
        if manifest.get("format") != FORMAT:
            found = manifest.get("format")
            raise CorruptCheckpointError(f"{path}: format {found}; this version reads {FORMAT}")
        return {name: FileFacts(**facts) for name, facts in manifest["files"].items()}

    def verify(self, part: int = 0, num_parts: int = 1) -> None:
        """Read every `num_parts`-th file, from number `part` on, and compare it with the manifest.

        Raises:
            CorruptCheckpointError: a file's content is not what was written.
        """
        for name in sorted(self._files)[part::num_parts]:
            if FileFacts.of(self.folder / name) != self._files[name]:
                raise CorruptCheckpointError(
                    f"{self.folder / name}: its content is not what was written (SHA-256 differs)"
                )

    @property
    def state(self) -> dict[str, Any]:
        """What `commit` was given as state."""
        return json.loads((self.folder / STATE).read_text("utf-8"))

    def fill(self, wanted: Sequence[Fragment]) -> None:
        """Overwrite the values of `wanted`, in place, with those of the checkpoint.

        Args:
            wanted: fragments in any cut, on any device.

        Raises:
            CorruptCheckpointError: elements that no file holds, such as those of a parameter of
                another name or size.

        Cost: reads each wanted element once; no more than one fragment is held in memory beside
        `wanted`.
        """
        if self._places is None:
            self._places = self._index()
        by_file: dict[str, list[tuple[Fragment, int, int]]] = defaultdict(list)
        for one in wanted:
            for begin, end, file in self._covering(one):
                by_file[file].append((one, begin, end))
        for file, parts in by_file.items():
            with safe_open(self.folder / file, framework="pt") as tensors:
                for one, begin, end in parts:
                    low, high = max(begin, one.start), min(end, one.start + one.values.numel())
                    key = f"{one.copy}:{one.name}@{begin}"
                    found = tensors.get_slice(key)[low - begin : high - begin]
                    one.values[low - one.start : high - one.start].copy_(found)

    def _covering(self, one: Fragment) -> list[tuple[int, int, str]]:
        """The stored fragments that together hold `one`, in order."""
        assert self._places is not None
        places = self._places.get((one.copy, one.name), [])
        position, end = one.start, one.start + one.values.numel()
        found = []
        at = max(0, bisect.bisect_right(places, (position, float("inf"), "")) - 1)
        while position < end and at < len(places) and places[at][0] <= position < places[at][1]:
            found.append(places[at])
            position = places[at][1]
            at += 1
        if position < end:
            raise CorruptCheckpointError(
                f"{self.folder}: holds no {one.copy} of {one.name} from element {position} on; it "
                "was written for another model"
            )
        return found

    def _index(self) -> dict[tuple[str, str], list[tuple[int, int, str]]]:
        """(copy, parameter) -> (first element, end, file) of what is stored of it, in order."""
        places: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
        for file in self._files:
            if not file.startswith("rank-"):
                continue
            try:
                with safe_open(self.folder / file, framework="pt") as tensors:
                    for key in tensor_names(tensors):
                        copy, _, rest = key.partition(":")
                        name, _, start = rest.rpartition("@")
                        size = tensors.get_slice(key).get_shape()[0]
                        places[copy, name].append((int(start), int(start) + size, file))
            except SafetensorError as error:
                raise CorruptCheckpointError(f"{self.folder / file}: {error}") from None
        return {key: sorted(found) for key, found in places.items()}
