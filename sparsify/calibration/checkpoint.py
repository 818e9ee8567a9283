"""A walk over a checkpoint of any size, written block by block, that continues after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from sparsify.calibration.batches import lanes_of
from sparsify.calibration.hidden_states import HiddenStateStore, Memory
from sparsify.calibration.timing import PhaseTimer
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.files import write_json

_PROGRESS = "progress.json"

_SHARE = 20.0

_SHORT_S = 0.25  # a state that is written faster is written whenever there is one

Walk = Callable[[HiddenStateStore, int, Callable[[int, nn.Module], None]], None]
"""walks from a block on: (hidden states before it, its index, called after each block)"""

Take = Callable[[int, nn.Module], tuple[Sequence[Any], Callable[[], None]]]
"""takes (index, solved block) and returns its layers' reports, and what writes all that becomes of
it, file by file whole or not at all, when the block is gone; in another thread"""


@dataclass(frozen=True)
class CheckpointWalk:
    """What is walked, who walks it, and how often it can be taken up again."""

    out: Path
    """folder for state, on a disk that all processes see"""
    num_blocks: int
    rows: TokenRows
    comm: Comm
    memory: Memory
    group: str
    """of the options, for messages: prune or quantize"""
    every: int = 1
    """blocks between two states that a killed run can resume from"""
    on_block: Callable[[int, int], None] | None = None
    """called as on_block(blocks done, blocks in all)"""
    clock: Callable[[], float] | None = None
    """seconds; with it states that take long to write come more rarely (`_Pace`)"""

    def run(self, walk: Walk, take: Take, timer: PhaseTimer) -> list[dict[str, Any]]:
        """Walk the blocks that are not done yet.

        A block is written while the next one is solved, and is on the disk before a state says so.

        Returns:
            Reports of all layers as plain values, those of an earlier call's blocks among them.

        Raises:
            InputError: `out` holds another model's state, or one of rows cut into other batches.
            The rest as `walk` and what writes, which is said when the next block is done.
        """
        comm, total = self.comm, self.num_blocks
        mine = sum(map(len, lanes_of(self.rows, comm, self.memory.batch_size)))
        state = _State(self, sum(comm.gather_objects(mine)))
        store = HiddenStateStore(
            self.memory.activations, self.memory.device, self.out / "streams", comm.rank,
            comm.world_size,
        )  # fmt: skip

        pace = _Pace(comm, self.clock)

        def finish(index: int, block: nn.Module) -> None:
            reports, write = take(index, block)
            with timer.measure("write"):
                state.keep(reports)
                writer.start(write)
                if index + 1 == total:
                    writer.wait()
                    state.commit(index + 1, store)
                elif (index + 1) % self.every == 0 and pace.is_due():
                    with pace.measured():
                        store.commit(index + 1)
                        writer.wait()
                        state.commit(index + 1, store)
            if self.on_block is not None:
                self.on_block(index + 1, total)

        if self.on_block is not None and state.num_done:
            self.on_block(state.num_done, total)
        if state.num_done < total:
            with _Writer() as writer:
                walk(store, state.num_done, finish)
        return state.layers


class _Writer:
    """A thread that writes one block while the next is solved.

    A context: leaving it waits for what is being written.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="finished block")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(wait=True)

    def start(self, write: Callable[[], None]) -> None:
        """Start to write; waits for the block before, so that no more than one is held for it."""
        self.wait()
        self._last = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until all is on the disk; raises what the writing raised."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()


class _Pace:
    """When states are written: so that the writing takes at most a twentieth of the time.

    The hidden states of 512 rows of 2,048 tokens in a model 4096 wide are 8.6 GB for each model
    that is followed; written after each of 32 blocks they would take longer than the pruning. A
    walk that continues after a kill does what came after the last state again, with the same bits.
    """

    def __init__(self, comm: Comm, clock: Callable[[], float] | None) -> None:
        self._comm = comm
        self._clock = clock
        self._ended_s = 0.0
        self._taken_s = 0.0

    def is_due(self) -> bool:
        """Whether to write one now; the same on every process."""
        if self._clock is None:
            return True
        worth_s = _SHARE * self._taken_s if self._taken_s > _SHORT_S else 0.0
        is_due: bool = self._comm.gather_objects(self._clock() - self._ended_s >= worth_s)[0]
        return is_due

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around the writing of a state."""
        started_s = self._clock() if self._clock is not None else 0.0
        yield
        if self._clock is not None:
            self._ended_s = self._clock()
            self._taken_s = self._ended_s - started_s


class _State:
    """How far the walk is: blocks done, and their reports."""

    def __init__(self, walk: CheckpointWalk, num_batches: int) -> None:
        out, num_blocks = walk.out, walk.num_blocks
        self._path = out / _PROGRESS
        self._comm = walk.comm
        self._sizes = {"num_blocks": num_blocks, "num_batches": num_batches}
        out.mkdir(parents=True, exist_ok=True)
        self.layers: list[dict[str, Any]] = []
        self.num_done = 0
        if self._comm.rank == 0 and self._path.is_file():
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found["num_blocks"] != num_blocks:
                raise InputError(
                    f"{out}: holds {found['num_blocks']} blocks, the model has {num_blocks}; use "
                    "another folder"
                )
            if found["num_batches"] != num_batches:
                raise InputError(
                    f"{out}: started with the rows cut into {found['num_batches']} batches, now "
                    f"into {num_batches}; resume with the {walk.group}.batch_size (and, with few "
                    "rows, the number of workers) that it was started with"
                )
            self.num_done, self.layers = found["num_done"], found["layers"]
        self.num_done, self.layers = self._comm.gather_objects((self.num_done, self.layers))[0]

    def keep(self, reports: Sequence[Any]) -> None:
        """Add a block's reports to the next commit."""
        self.layers += [asdict(report) for report in reports]

    def commit(self, num_done: int, store: HiddenStateStore) -> None:
        """Everything up to here is on the disk on every process: say so, then clean up."""
        self._comm.barrier()
        if self._comm.rank == 0:
            value = {"num_done": num_done, **self._sizes, "layers": self.layers}
            write_json(self._path, value)
            store.drop(keep_block=num_done)
        self._comm.barrier()
