"""What pruning reports of each layer, and how far a checkpoint's pruning is.

Shape suffixes: O output features (rows of a weight), I input features.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsify.calibration.hidden_states import HiddenStateStore
from sparsify.comm import Comm
from sparsify.errors import InputError
from sparsify.files import write_json

PHASES = ("load", "statistics", "reduce", "factor", "solve", "gather", "forward", "write")
"""Parts of the time of a layer, in the order in which they happen."""

FEW_TOKENS = 20.0
"""Tokens per input column under which statistics hold too much noise to be trusted. On a small
Llama, fitting layers to the dense model's outputs helped held-out KL at 32 tokens per column and
did harm at 8."""

_PROGRESS = "progress.json"


@dataclass
class LayerReport:
    """What pruning did to one layer."""

    name: str
    """full dotted name, without ".weight\""""
    block: int
    """index of the decoder block"""
    shape: tuple[int, int]
    """(output features, input features)"""
    num_tokens: int
    """calibration tokens in the Hessian"""
    tokens_per_column: float
    """the same for each input column; below about ten, the Hessian is mostly noise"""
    error: float
    """tr((W - Z) H (W - Z)^T): mean square output error per calibration token, summed over rows"""
    relative_error: float
    """error / tr(W H W^T); 0 when the layer's output was zero anyway"""
    sparsity: float
    """share of the weights that were pruned"""
    damping: float | None
    """damping that was used; larger than asked for when the Hessian needed it; None: no damping"""
    num_dead_columns: int
    """input columns that were zero on every calibration token"""
    condition: float | None
    """estimate of the damped Hessian's condition number; None where no factor was computed"""
    large_kept: float
    """share of the largest hundredth of each row, by absolute value, that survived"""
    keep_mask_sha256: str
    """of the layer's mask, see `masks.mask_digest`"""
    seconds: dict[str, float] = field(default_factory=dict)
    """time by phase; what was done for the block as a whole is divided over its layers"""


class PruneState:
    """How far a checkpoint's pruning is: blocks done, and their reports."""

    def __init__(self, out: Path, comm: Comm, num_blocks: int, num_batches: int) -> None:
        self._path = out / _PROGRESS
        self._comm = comm
        self._sizes = {"num_blocks": num_blocks, "num_batches": num_batches}
        out.mkdir(parents=True, exist_ok=True)
        self._layers: list[dict[str, Any]] = []
        self.num_done = 0
        if comm.rank == 0 and self._path.is_file():
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found["num_blocks"] != num_blocks:
                raise InputError(
                    f"{out}: holds {found['num_blocks']} blocks, the model has {num_blocks}; use "
                    "another folder"
                )
            if found["num_batches"] != num_batches:
                raise InputError(
                    f"{out}: started with the rows cut into {found['num_batches']} batches, now "
                    f"into {num_batches}; resume with the prune.batch_size (and, with few rows, "
                    "the number of workers) that it was started with"
                )
            self.num_done, self._layers = found["num_done"], found["layers"]
        self.num_done, self._layers = comm.gather_objects((self.num_done, self._layers))[0]

    def keep(self, reports: list[LayerReport]) -> None:
        """Add a block's reports to the next commit."""
        self._layers += [asdict(report) for report in reports]

    def commit(self, num_done: int, reports: list[LayerReport], store: HiddenStateStore) -> None:
        """Everything up to here is on the disk on every process: say so, then clean up."""
        self.keep(reports)
        self._comm.barrier()
        if self._comm.rank == 0:
            value = {"num_done": num_done, **self._sizes, "layers": self._layers}
            write_json(self._path, value)
            store.drop(keep_block=num_done)
        self._comm.barrier()

    def reports(self) -> list[LayerReport]:
        """Of all blocks, in order."""
        return [LayerReport(**{**v, "shape": tuple(v["shape"])}) for v in self._layers]
