"""Options of the prune stage that look at the whole dense model first: weights of tokens, folded
rotations, and which layers stay dense under a budget.

Each is worked out once, rotations by all workers and the rest by rank 0, and put into the run's
scratch folder, where all workers read it and a run that resumes finds it again.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from conf.schema import Config
from jobs.runs.folder import read_json
from sparsify.calibration.fisher import fisher_token_weights
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.files import write_json
from sparsify.formats.sparse_folder import ROTATION
from sparsify.masks.storage import MaskFile
from sparsify.models.blocks import layer_places
from sparsify.models.load import load_model, weight_files
from sparsify.models.save import save_model
from sparsify.pattern import Pattern
from sparsify.pruning.budget import allocate
from sparsify.rotation.rotate import rotate_model
from sparsify.rotation.sites import RotationSites, find_rotation_sites
from sparsify.tensors import write_tensors

NUM_HELD_ROWS = 32
"""calibration rows that no weight is fitted to, to measure a layer's damage on"""

_ROTATION_FACTS = "rotation.json"

_START_OVER = "add run.redo=[prune] to start the stage over"

# Share of SparseGPT's excess log-perplexity that is left after 20, 30 and 40 steps, mean of two or
# three seeds: embedded 0.39, 0.37, 0.35; stories260k 0.48, 0.46, 0.47; books 0.48, 0.46, 0.45.
_DEFAULT_STEPS = 30

_LARGEST_BYTES = 32 * 10**9  # of a model that is held whole without being asked to

# Of the calibration, for the search for rotations. With four times the tokens two small models were
# pruned to the same perplexity (0.2 % better on one, 0.8 % worse on the other).
_TOKENS_PER_FEATURE = 16

Say = Callable[[float, float, str], None]


def once(path: Path, comm: Comm, make: Callable[[], None], *, is_shared: bool = False) -> float:
    """Make `path` unless it is there; all processes continue when it is.

    Args:
        path: file or folder, on a disk that all processes see.
        comm: the processes.
        make: makes it, on rank 0 alone; or where it `is_shared` on all processes, and then has what
            it raises on one of them raised on all.

    Returns:
        The seconds that it took, by this run or by the one that this run carries on.

    Raises:
        What `make` raises, on all processes.
    """
    marker = path.with_name(f"{path.name}.seconds.json")

    def is_made() -> bool:
        if comm.rank == 0 and not marker.exists() and path.is_dir():
            shutil.rmtree(path)  # made, and killed before that was noted
        return marker.exists()

    if not comm.gather_objects(comm.run_together(is_made))[0]:  # as rank 0 sees it
        started_s = time.perf_counter()
        if is_shared:
            make()
        else:
            comm.run_together(lambda: make() if comm.rank == 0 else None)
        seconds = time.perf_counter() - started_s
        comm.run_together(lambda: write_json(marker, seconds) if comm.rank == 0 else None)
    try:
        return float(marker.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{marker}: damaged, no number; {_START_OVER}") from None


def fisher_weights(
    dense: Path, rows: TokenRows, config: Config, scratch: Path, comm: Comm, device: str, say: Say
) -> tuple[Tensor, float]:
    """float32 (blocks, N, T): how much each token counts; and the seconds it took to find out."""
    path = scratch / "fisher.safetensors"

    def make() -> None:
        model = load_model(dense, config.model.dtype, device)
        weights_LNT = fisher_token_weights(
            model, rows, config.prune.batch_size,
            lambda done, total: say(done, total, "rows, Fisher weights"), seed=config.run.seed,
        )  # fmt: skip
        write_tensors(path, {"weights": weights_LNT}, {"format": "pt"})

    seconds = once(path, comm, make)
    return load_file(path)["weights"], seconds


def wanted_rotation_steps(config: Config, dense: Path) -> int:
    """Steps that were asked for, or for null those of the default method's model.

    Whether a model of this size can be turned is seen when it is loaded: `rotated_model`.
    """
    settings = config.prune
    if settings.rotation_steps is not None:
        return settings.rotation_steps
    fits = sum(path.stat().st_size for path in weight_files(dense)) <= _LARGEST_BYTES
    wanted = settings.method == "twofour" and settings.existing == "ignore" and fits
    return _DEFAULT_STEPS if wanted else 0


def rotated_model(
    dense: Path, rows: TokenRows, config: Config, scratch: Path, comm: Comm, device: str, say: Say
) -> tuple[Path | None, dict[str, Any]]:
    """Fold the best rotations found into the dense model's weights.

    Returns:
        Folder of the rotated model, the rotation in it; and what rotating did, as plain values.
        Where prune.rotation_steps is null and the model cannot be rotated, None and {"refused",
        "seconds"}.

    Raises:
        InputError: the steps were asked for, and the model cannot be rotated.
    """
    folder = scratch / "rotated"
    seconds = once(
        folder, comm, lambda: _rotate(dense, rows, config, folder, comm, device, say),
        is_shared=True,
    )  # fmt: skip
    facts = read_json(folder / _ROTATION_FACTS, _START_OVER)
    facts["seconds"] = seconds
    return (None if "refused" in facts else folder), facts


def _rotate(
    dense: Path, rows: TokenRows, config: Config, folder: Path, comm: Comm, device: str, say: Say
) -> None:
    """Make the folder of the rotated model, or of why there is none; all processes together."""
    steps = wanted_rotation_steps(config, dense)

    def load() -> tuple[Any, RotationSites | str]:
        model = load_model(dense, config.model.dtype, device)
        try:
            return model, find_rotation_sites(model)
        except InputError as error:
            if config.prune.rotation_steps is not None:
                raise
            return model, str(error)

    model, sites = comm.run_together(load)
    if isinstance(sites, str):
        refused = {"refused": sites}
        comm.run_together(lambda: _write_rotated(folder, refused, lambda partial: None, comm))
        return
    is_tied = sites.head.weight is sites.embedding.weight
    width = model.config.get_text_config().hidden_size
    wanted = math.ceil(_TOKENS_PER_FEATURE * width / rows.ids_NT.shape[1])
    # Spread over all rows: they lie source by source.
    few = rows[:: max(1, len(rows) // wanted)]
    report = rotate_model(
        model, few, steps=steps, seed=config.run.seed, batch_size=config.prune.batch_size,
        pattern=Pattern.parse(config.prune.pattern), skip=config.prune.skip,
        use_value_rotation=bool(sites.values),
        on_step=lambda done, total, loss: say(done, total, f"steps, rotation {loss:.4f}"),
        comm=comm,
    )  # fmt: skip
    facts = {
        "num_tokens": few.num_tokens,
        "steps": steps,
        "has_value_rotations": bool(sites.values),
        "untied_bytes": sites.head.weight.nbytes if is_tied else 0,
        "entropy": [report.entropy_before, report.entropy_after],
        "pruned_share": [report.pruned_share_before, report.pruned_share_after],
        "max_logit_difference": report.max_logit_difference,
    }

    def fill(partial: Path) -> None:
        save_model(model, None, partial)
        report.rotation.save(partial / ROTATION)

    comm.run_together(lambda: _write_rotated(folder, facts, fill, comm))


def _write_rotated(
    folder: Path, facts: dict[str, Any], fill: Callable[[Path], None], comm: Comm
) -> None:
    """Rank 0 makes the folder, whole or not at all."""
    if comm.rank != 0:
        return
    partial = folder.with_name(".rotated.tmp")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    fill(partial)
    write_json(partial / _ROTATION_FACTS, facts)
    partial.rename(folder)


def dense_layers(
    dense: Path, pruned: Path, held_rows: TokenRows, config: Config, scratch: Path, comm: Comm,
    device: str, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Which layers stay dense under prune.budget, judged by the layers pruned in `pruned`.

    Returns:
        {"dense_names", "damages", "cost_share", "least_share"}, see `budget.Allocation`; and
        {"seconds"} that it took.
    """
    path = scratch / "allocation.json"

    def make() -> None:
        names = [n for f in sorted(pruned.glob("masks-*.safetensors")) for n in MaskFile(f)]
        kind, _, share = str(config.prune.budget).partition(":")
        found = allocate(
            load_model(dense, config.model.dtype, device), held_rows, _Weights(pruned, names),
            kind, float(share),  # type: ignore[arg-type]
            pattern=Pattern.parse(config.prune.pattern), batch_size=config.prune.batch_size,
            weight_bits=32 if config.model.dtype == "float32" else 16,
            on_batch=lambda done, total: say(done, total, "forwards, damage of layers"),
        )  # fmt: skip
        write_json(path, asdict(found))

    seconds = once(path, comm, make)
    return {**read_json(path, _START_OVER), "seconds": seconds}


class _Weights(Mapping[str, Tensor]):
    """Layer weights of a model folder, read when they are asked for."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._names = names
        self._places = dict(layer_places(folder))

    def __getitem__(self, name: str) -> Tensor:
        return self._places[f"{name}.weight"].read(None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
