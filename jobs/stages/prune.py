"""Stage prune: one-shot pruning of the dense model with each asked method, on all workers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runs.stage import Stage

if TYPE_CHECKING:
    from jobs.runs.artifact import StageWriter
    from jobs.runs.context import StageContext


def identity(context: StageContext) -> dict[str, Any]:
    """What decides the pruned weights."""
    from jobs.corpus.sources import source_fingerprint
    from jobs.runs.context import fingerprints, heldout_inputs

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
    from jobs.runs.folder import take_json
    from jobs.workers.prune import prune_on_worker

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
    from sparsify.formats.sparse_folder import MASKS, read_sparsity
    from sparsify.formats.verify import check_files
    from sparsify.masks.storage import MaskFile
    from sparsify.pattern import Pattern

    sparsity = read_sparsity(folder)
    assert sparsity is not None, "the stage has just written it"
    return check_files(folder, MaskFile(folder / MASKS), Pattern.parse(sparsity["pattern"]))


def check(context: StageContext) -> None:
    """Require that every layer to prune has whole groups of the pattern.

    Raises:
        InputError: a layer's inputs are no multiple of the group's length.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparsify.calibration.layers import prunable_linears
    from sparsify.pattern import Pattern, check_divides

    settings = context.config.prune
    model_config = AutoConfig.from_pretrained(context.models.dense, local_files_only=True)
    with torch.device("meta"):  # shapes without weights
        model = AutoModelForCausalLM.from_config(model_config)
    pattern = Pattern.parse(settings.pattern)
    for _, name, module in prunable_linears(model, settings.skip):
        check_divides(name, module.in_features, pattern)


STAGE = Stage("prune", "one-shot pruned models, one per method", identity, run, check=check)
