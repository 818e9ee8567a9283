"""Prune: one-shot pruning of the dense model, with each asked method, on all workers.

`python -m jobs.prune` runs the whole pipeline (jobs/pipeline.py); this module is its first stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from jobs._artifact import StageWriter
    from jobs._stage import StageContext


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the pruned weights."""
    from jobs._sources import source_fingerprint
    from jobs._stage import fingerprints, heldout_inputs

    config = context.config
    data = context.settings("data")["data"]
    return {
        "config": {
            **context.settings("prune"),
            "model.dtype": config.model.dtype,
            "data": {k: v for k, v in data.items() if k != "train"},
            "run.seed": config.run.seed,
        },
        "inputs": {
            **heldout_inputs(context),
            **fingerprints({"model": context.models.dense}),
            "calibration": source_fingerprint(config.data, "calibration"),
        },
    }


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Prune with the baselines and the main method; one model folder each."""
    from jobs._artifact import take_json

    settings = context.config.prune
    methods = [name for name in settings.baselines if name != settings.method] + [settings.method]
    payload = {
        "config": context.worker_config, "dense": context.models.dense, "methods": methods,
        "folder": writer.folder, "scratch": writer.scratch,
    }  # fmt: skip
    context.cluster.run_workers("prune", prune_on_worker, payload, writer.train_storage)
    return {
        "method": settings.method,
        "methods": methods,
        "pattern": settings.pattern,
        **take_json(writer.folder / "figures.json"),
        "gate": {method: _gate(writer.folder / method) for method in methods},
    }


def _gate(folder: Path) -> dict[str, int]:
    from jobs._gate import check_files
    from jobs._stage import MASKS, read_sparsity
    from sparsify.masks import MaskFile
    from sparsify.pattern import Pattern

    sparsity = read_sparsity(folder)
    assert sparsity is not None, "the stage has just written it"
    return check_files(folder, MaskFile(folder / MASKS), Pattern.parse(sparsity["pattern"]))


def prune_on_worker(context: WorkerContext, payload: dict[str, Any]) -> None:
    """On every worker: prune the dense model with each method, each from where it was left.

    A method's folder in the scratch space holds its finished blocks. All of them become part of
    the stage's result at the end, so that a run that is killed loses no more than a block.
    """
    from jobs._artifact import disk_errors, write_json
    from jobs._prune_worker import Pruning

    pruning = Pruning(context, payload["config"], payload["dense"], payload["scratch"])
    with disk_errors(payload["scratch"]):
        found = {
            name: pruning.run(name, index, len(payload["methods"]))
            for index, name in enumerate(payload["methods"])
        }
        if context.rank != 0:
            return
        for name in payload["methods"]:
            pruning.publish(name, payload["folder"] / name)
    phases = {name: _seconds(reports) for name, reports in found.items()}
    seconds = {name: sum(parts.values()) for name, parts in phases.items()}
    seconds[payload["config"].prune.method] += pruning.seconds_ahead
    layers = [{"method": name, **layer} for name, reports in found.items() for layer in reports]
    figures = {
        "layers": layers,
        "packed_bytes": {name: pruning.packed_bytes(payload["folder"] / name) for name in found},
        "phases": phases,
        "seconds": seconds,
        "dense_layers": pruning.dense_layers,
        "rotation": pruning.rotation,
    }
    write_json(payload["folder"] / "figures.json", figures)


def _seconds(reports: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by phase over all layers."""
    phases = {phase: 0.0 for report in reports for phase in report["seconds"]}
    return {phase: sum(r["seconds"].get(phase, 0.0) for r in reports) for phase in phases}


if __name__ == "__main__":
    from jobs._entry import main

    main("prune")
