"""What was planned beside what was measured: memory and time of recoveries and prunings."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig, Qwen3MoeConfig

from jobs.benchmarks.data import write_random_store
from jobs.benchmarks.sides.planned import Folders, distill_config, work
from jobs.benchmarks.support.arguments import add_option, settings_of
from jobs.benchmarks.support.mixtures import MIXTURES, mixture_config
from jobs.benchmarks.support.published import NOT_PLANNED, compared
from jobs.benchmarks.support.random_llama import llama_config, write_checkpoint
from jobs.benchmarks.support.record import Outcome, Table, Target
from jobs.planning.calibration import typical
from jobs.planning.layouts import machine_of, training_of
from jobs.planning.models import shape_of
from sparsify.costs.layout import Pruning
from sparsify.costs.memory import pruning_memory, training_memory
from sparsify.costs.seconds import Rates, pruning_seconds, step_seconds, total
from sparsify.errors import InputError
from sparsify.files import write_json
from sparsify.masks.select import keep_mask_from_scores
from sparsify.methods import get_method
from sparsify.pattern import Pattern

SUMMARY = "planned memory and time beside those of runs made here and of published ones"

EXAMPLES = ("plan --save", "plan --runs 3")

_STEPS = 5  # of a recovery; the first warms up

_TARGET, _TARGET_PUBLISHED = 0.15, 0.25

_SMALL = {"shape": "bench-1k", "layers": 2, "vocabulary": 4096, "sequence_length": 256}
_WIDE = {"shape": "bench-512", "layers": 4, "vocabulary": 16384, "sequence_length": 512}

_MIXED = {"shape": "bench-512-moe", "layers": 4, "vocabulary": 4096, "sequence_length": 256}

_BROAD = {"shape": "bench-2k", "layers": 1, "vocabulary": 4096, "sequence_length": 256}


def _recovery(sizes: dict[str, Any], workers: int, **distill: Any) -> dict[str, Any]:
    return {"kind": "distill", **sizes, "workers": workers, "batch_size": 4, "steps": _STEPS,
            "distill": {"micro_batch_size": 2, **distill}}  # fmt: skip


def _pruning(sizes: dict[str, Any], workers: int, method: str) -> dict[str, Any]:
    return {"kind": "prune", **sizes, "workers": workers, "method": method, "samples": 16,
            "batch_size": 4, "dtype": "float32"}  # fmt: skip


RUNS: tuple[dict[str, Any], ...] = (
    _recovery(_SMALL, 2, zero_stage=1),
    _recovery(_WIDE, 2, zero_stage=3, micro_batch_size=1),
    _recovery(_SMALL, 1, zero_stage=0),
    _pruning({**_SMALL, "layers": 4}, 2, "sparsegpt"),
    _recovery(_SMALL, 2, zero_stage=2),
    _pruning(_WIDE, 1, "twofour"),
    _recovery(_WIDE, 1, zero_stage=0, micro_batch_size=4),
    _pruning(_WIDE, 2, "wanda"),
    _recovery(_SMALL, 2, zero_stage=3),
    _pruning({**_SMALL, "layers": 4}, 1, "sparsegpt"),
    _recovery(_SMALL, 2, zero_stage=3, teacher_placement="sharded"),
    _recovery(_SMALL, 1, zero_stage=2, micro_batch_size=4, recompute_share=1.0),
    _recovery({**_SMALL, "shape": "bench-512", "layers": 4}, 1, zero_stage=2, precision="bf16"),
    # Measured when the plan was finished: nothing in it was chosen with these in view.
    _recovery(_BROAD, 1, zero_stage=2),
    _pruning(_BROAD, 1, "sparsegpt"),
    _recovery(_MIXED, 1, zero_stage=2, micro_batch_size=4),
    _pruning(_MIXED, 1, "sparsegpt"),
)
"""what is measured, in this order"""

Figures = list[dict[str, Any]]
"""of a run's workers"""

_NOTES = (
    "memory: most that a worker's process held during a step or a pruning, beyond what it held "
    "before a model was loaded (imports, Ray's and DeepSpeed's own)",
    "time: seconds of CPU of one worker with one thread, the fastest of the steps after the first, "
    "of a second run of its own: what shows memory (glibc gives back what is freed) costs time",
    "planned: by the products, attention and elementwise work that each worker was measured to do "
    "in a second before and after its run, times what the other runs of the kind typically "
    "(median) took over theirs",
    "what DeepSpeed holds and which passes are counted was looked up in such runs of bench-1k and "
    "bench-512 while the plan was written; the two runs of bench-2k came after it, "
    "but for the last block's second pass, which the second of them showed to be planned in vain",
    "published: other software on other machines, see the sources in the record",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    text = f"measure the first so many of {len(RUNS)} runs; 0: published ones alone"
    add_option(parser, "--runs", len(RUNS), text)
    resume = "take over runs that an interrupted benchmark in the same --workdir has measured"
    parser.add_argument("--resume", action="store_true", help=resume)


def run(options: Namespace) -> Outcome:
    """Measure the runs, one after another, and compare.

    Raises:
        InputError: a number of runs that there is not.
    """
    if not 0 <= options.runs <= len(RUNS):
        raise InputError(f"--runs {options.runs}: there are {len(RUNS)}")
    folder = options.workdir / "plan"
    seen = _Measured(folder / "figures.json", options.resume)
    found = []
    for number, one in enumerate(RUNS[: options.runs]):
        print(f"{number + 1} of {options.runs}: {label(one)}", flush=True)
        with _small_allocations():
            memory = seen.of(one, "memory", partial(_measure, one, folder, False))
        time = seen.of(one, "time", partial(_measure, one, folder, True))
        dense = _prepare(one, folder, folder / "run").dense
        found.append(compare(one, {"memory": memory, "time": time}, dense))
    with_factors(found)
    return summarise(found, settings_of(options, "runs"))


@contextmanager
def _small_allocations() -> Iterator[None]:
    """Have glibc give back what is freed, so that memory held is memory used; pages that are taken
    anew for every tensor cost a third of the time, so that a run's time is measured without."""
    names = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def label(one: dict[str, Any]) -> str:
    """A run in a few words."""
    size = f"{one['shape']} x {one['layers']}, {one['workers']} worker{'s' * (one['workers'] > 1)}"
    if one["kind"] == "prune":
        return f"prune {one['method']}, {size}"
    settings = one["distill"]
    more = [f"micro batch {settings['micro_batch_size']}"]
    more += ["bf16"] if settings.get("precision") == "bf16" else []
    more += ["all recomputed"] if settings.get("recompute_share") else []
    more += ["teacher split"] if settings.get("teacher_placement") else []
    return f"distill ZeRO-{settings['zero_stage']}, {size}, {', '.join(more)}"


class _Measured:
    """Figures of the runs that are done, in a file, so that an interruption loses one run alone."""

    def __init__(self, path: Path, is_resumed: bool) -> None:
        self._path = path
        self._figures: dict[str, Any] = {}
        if is_resumed and path.is_file():
            self._figures = json.loads(path.read_text(encoding="utf-8"))

    def of(self, one: dict[str, Any], what: str, measure: Callable[[], Figures]) -> Figures:
        """Figures of a run's workers, measured where they are not there."""
        name = f"{what} of {json.dumps(one, sort_keys=True)}"
        if name not in self._figures:
            self._figures[name] = measure()
            write_json(self._path, self._figures)
        return self._figures[name]


def _measure(one: dict[str, Any], folder: Path, is_timed: bool) -> Figures:
    """What each worker of a run measured."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    folders = _prepare(one, folder, out)
    spawn(work, (one, folders, is_timed), nprocs=one["workers"])
    seen = [
        json.loads((out / f"figures-{rank}.json").read_text(encoding="utf-8"))
        for rank in range(one["workers"])
    ]
    shutil.rmtree(out)
    return seen


def compare(one: dict[str, Any], seen: dict[str, Figures], dense: Path) -> dict[str, Any]:
    """Measured and planned memory and time of a run; the largest of its workers'.

    Args:
        one: the run.
        seen: "memory" and "time" -> what was measured when that was measured.
        dense: folder of its model.
    """
    memory, seconds, parts = planned(one, dense, _rates_of(seen["time"]))
    if one["kind"] == "prune":
        measured_bytes = max(figures["peak_bytes"] for figures in seen["memory"])
        measured_s = max(figures["cpu_s"] for figures in seen["time"])
    else:
        measured_bytes = max(max(figures["step_peak_bytes"]) for figures in seen["memory"])
        measured_s = max(min(figures["step_cpu_s"][1:]) for figures in seen["time"])
    return {
        "label": label(one), "kind": one["kind"], "run": one, "measured_bytes": measured_bytes,
        "planned_bytes": memory, "measured_s": measured_s, "base_s": seconds, "parts": parts,
        "workers": seen,
    }  # fmt: skip


def _prepare(one: dict[str, Any], folder: Path, out: Path) -> Folders:
    """The model, its pruned self, and rows; made once for all runs of a size."""
    name = f"{one['shape']}-{one['layers']}-{one['vocabulary']}"
    length = one["sequence_length"]
    dense, student, rows = (folder / f"{name}{end}" for end in ("", "-2-4", f"-rows-{length}"))
    if not dense.is_dir():
        write_checkpoint(dense, config_of(one), 0, torch.float32)
    if not student.is_dir():
        shutil.copytree(dense, student)
        for path in student.glob("*.safetensors"):
            tensors = load_file(path)
            for key, weight in tensors.items():
                if ".layers." in key and weight.ndim == 2 and not key.endswith("mlp.gate.weight"):
                    weight *= keep_mask_from_scores(weight.abs(), Pattern.parse("2:4"))
            save_file(tensors, path, metadata={"format": "pt"})
    if not rows.is_dir():
        write_random_store(rows, 1e-9 * 3 * 256 * length, length, one["vocabulary"], 0)
    return Folders(dense, student, rows, out)


def config_of(one: dict[str, Any]) -> LlamaConfig | Qwen3MoeConfig:
    """Configuration of a run's model."""
    sizes = one["layers"], 1024, one["vocabulary"]
    if one["shape"] in MIXTURES:
        return mixture_config(MIXTURES[one["shape"]], *sizes)
    return llama_config(one["shape"], *sizes)


def _rates_of(workers: Figures) -> Rates:
    """The mean of what all workers reached before and after their run."""
    found = [rates for figures in workers for rates in figures["rates"]]
    means: dict[str, Any] = {
        name: statistics.fmean(rates[name] for rates in found) for name in found[0]
    }
    return Rates(**means | {"overlaps": False})


def planned(
    one: dict[str, Any], folder: Path, rates: Rates
) -> tuple[float, float, dict[str, float]]:
    """Bytes, seconds before any correction, and the bytes by component."""
    shape, _ = shape_of(str(folder))
    if one["kind"] == "distill":
        config = distill_config(one)
        setup = training_of(config, machine_of(config, 1.0))
        use = training_memory(shape, shape, setup)
        return use.total, total(step_seconds(shape, shape, setup, rates)), use.parts
    known = get_method(one["method"])
    layout = Pruning(
        one["method"], known.order, known.needs_hessian, known.needs_factor, known.needs_teacher,
        one["samples"], one["sequence_length"], one["batch_size"], one["workers"],
        4 if one["dtype"] == "float32" else 2, uses_gpu=False,
    )  # fmt: skip
    use = pruning_memory(shape, layout)
    return use.total, total(pruning_seconds(shape, layout, rates)), use.parts


def with_factors(found: list[dict[str, Any]]) -> None:
    """Correct each time by what the other runs of its kind took: none is its own judge."""
    for one in found:
        others = [
            other["measured_s"] / other["base_s"]
            for other in found
            if other is not one and other["kind"] == one["kind"]
        ]
        one["planned_s"] = one["base_s"] * (typical(others) if others else 1.0)


def summarise(found: list[dict[str, Any]], settings: dict[str, Any]) -> Outcome:
    """The two tables, and the promises they are held to."""
    published = list(compared())
    figures: dict[str, Any] = {
        "runs": found,
        "published": [{**vars(one), "ratio": one.ratio} for one in published],
        "not_planned": [list(one) for one in NOT_PLANNED],
    }
    targets = []
    for name, key in (("memory", "bytes"), ("time", "s")):
        errors = [abs(r[f"planned_{key}"] / r[f"measured_{key}"] - 1) for r in found]
        for one, error in zip(found, errors, strict=True):
            what = f"{name}: {one['label']}"
            targets.append(Target.at_most(what, _TARGET, error))
    for entry in published:
        what = f"published: {entry.what}"
        targets.append(Target.at_most(what, _TARGET_PUBLISHED, abs(entry.ratio - 1)))
    tables = [*table_of_runs(found), table_of_published(figures["published"])]
    return Outcome("cpu", 1, settings, figures, tables, targets, list(_NOTES))


def table_of_runs(found: list[dict[str, Any]]) -> list[Table]:
    """Memory and time of every run; no table where none was measured."""
    rows = [
        (
            one["label"], f"{one['measured_bytes'] / 1e6:,.0f} MB",
            f"{one['planned_bytes'] / 1e6:,.0f} MB",
            f"{one['planned_bytes'] / one['measured_bytes']:.2f}", f"{one['measured_s']:.2f} s",
            f"{one['planned_s']:.2f} s", f"{one['planned_s'] / one['measured_s']:.2f}",
        )
        for one in found
    ]  # fmt: skip
    headings = ("run", "memory", "planned", "ratio", "CPU time", "planned", "ratio")
    return [Table(headings, rows)] if rows else []


def table_of_published(found: list[dict[str, Any]]) -> Table:
    """Published figures beside what is planned for them."""
    rows = [
        (
            one["what"], f"{one['published']:,.6g} {one['unit']}",
            f"{one['planned']:,.0f}" if one["planned"] >= 1000 else f"{one['planned']:.4g}",
            f"{one['ratio']:.2f}",
        )
        for one in found
    ]  # fmt: skip
    return Table(("published", "figure", "planned", "ratio"), rows)
