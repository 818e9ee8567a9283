"""summary.json: what a run measured (schema 1; keys in docs/run-folder.md), and its table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from conf.options.run import STAGES
from jobs.reporting.results import quantized_as
from jobs.runs.artifact import RECORD, read_record, versions
from jobs.runs.context import StageContext
from jobs.runs.folder import write_json
from sparsify.formats.sparse_folder import model_name, read_sparsity
from sparsify.packed.layout import packed_layers
from sparsify.pattern import DENSE

SCHEMA = 1

_MADE_BY = {"finetune": "fine-tuned", "distill": "recovered"}
"""stage -> what its model is called, the last stage first"""


def write_summary(run_dir: Path, context: StageContext) -> dict[str, Any]:
    """Collect the records of the run's finished stages into summary.json.

    Stages of the run that this command did not ask for count as reused.
    """
    summary = build_summary(run_dir, context)
    write_json(run_dir / "summary.json", summary)
    return summary


def build_summary(run_dir: Path, context: StageContext) -> dict[str, Any]:
    """The summary as plain values; nothing but the records decides its figures."""
    records = {}
    for stage in STAGES:
        path = run_dir / stage / RECORD
        if path.is_file() and stage != "report":
            records[stage] = read_record(path.parent)
    for stage in ("distill", "finetune", "quantize"):
        if stage not in context.models.made:
            records.pop(stage, None)  # made from an earlier pruning than the one there is now
    metrics = {stage: record["metrics"] for stage, record in records.items()}
    durations = {stage: record["duration_s"] for stage, record in records.items()}
    distill, pretrain = metrics.get("distill"), metrics.get("pretrain")
    warnings = [text for figures in metrics.values() for text in figures.get("warnings", [])]
    return {
        "schema": SCHEMA,
        "run": _run_facts(run_dir, context, metrics, sum(durations.values())),
        "results": _results(context, metrics),
        "tasks": _tasks(metrics),
        "stages": [
            {
                "name": stage,
                "status": context.statuses.get(stage, "reused"),
                "duration_s": duration_s,
            }
            for stage, duration_s in durations.items()
        ],
        "layers": metrics.get("prune", {}).get("layers", []),
        "dropping": _dropping(metrics.get("drop")),
        "pruning": _pruning(metrics.get("prune", {})),
        "pretraining": pretrain and _recovery(pretrain),
        "recovery": distill and _recovery(distill),
        "quantization": metrics.get("quantize", {}).get("quantization"),
        "speed": metrics.get("export", {}).get("speed"),
        "warnings": list(dict.fromkeys(warnings)),
    }


def _run_facts(
    run_dir: Path, context: StageContext, metrics: dict[str, Any], duration_s: float
) -> dict[str, Any]:
    config, spec = context.config, context.config.cluster
    prune = metrics.get("prune", {})
    return {
        "name": run_dir.name,
        "dir": str(run_dir),
        "command": context.command,
        "model": model_name(context.models.dense),
        "num_parameters": _num_parameters(context.models.dense),
        "pattern": prune.get("pattern") or _pattern_of(context),
        "method": prune.get("method", context.models.method),
        "seed": config.run.seed,
        "cluster": spec.name,
        "num_workers": spec.num_workers,
        "device": "cuda" if spec.uses_gpu else "cpu",
        "versions": versions(),
        "duration_s": round(duration_s, 3),
    }


def _recovery(distill: dict[str, Any]) -> dict[str, Any]:
    """The curve and its speed; the forecast made on the way and the goodput, null without one."""
    kept = {key: distill[key] for key in ("num_tokens", "tokens_per_s", "steps")}
    found = ("forecast", "goodput", "heldout", "teacher_float8_kl", "mask_share_moved")
    return kept | {key: distill.get(key) for key in found}


_DROPPING = (
    "rule", "num_layers_before", "num_layers", "dropped_layers", "dropped_sublayers", "kept_layers",
    "num_weights_before", "num_weights", "num_rows", "num_tokens", "distances", "rounds",
)  # fmt: skip


def _dropping(drop: dict[str, Any] | None) -> dict[str, Any] | None:
    """Which layers went, and why; null without the stage."""
    return drop and {key: drop.get(key) for key in _DROPPING}


def _pruning(prune: dict[str, Any]) -> list[dict[str, Any]]:
    """Time of each method's walk over the model, and of its phases; records before had no times."""
    phases = prune.get("phases", {})
    return [
        {"method": method, "duration_s": duration_s, "seconds": phases.get(method, {})}
        for method, duration_s in prune.get("seconds", {}).items()
    ]


def _pattern_of(context: StageContext) -> str:
    """Pattern of the sparse model that a run without a prune stage started from."""
    models = context.models
    for folder in reversed(models.all_sparse().values()):
        sparsity = read_sparsity(folder)
        if sparsity is not None:
            return str(sparsity["pattern"])
    return context.config.prune.pattern


def _num_parameters(folder: Path) -> int:
    """Elements of all tensors that a model folder stands for (headers only are read)."""
    packed = packed_layers(folder)
    total = sum(math.prod(layer.shape) for layer in packed.values())
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                layer, _, part = name.rpartition(".")
                if not (layer in packed and part.startswith("weight")):
                    total += math.prod(file.get_slice(name).get_shape())
    return total


def _results(context: StageContext, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per model, in the order of the pipeline."""
    from sparsify.evaluation.perplexity import log_gap_recovered  # imports torch

    scores = dict(metrics.get("pretrain", metrics.get("evaluate", {})).get("results", {}))
    made = {**context.models.metrics, **metrics}  # also of the run that this one comes from
    gates = {
        **made.get("drop", {}).get("gate", {}),
        **made.get("prune", {}).get("gate", {}),
        "recovered": made.get("distill", {}).get("gate"),
        "finetuned": made.get("finetune", {}).get("gate"),
    }
    if "quantize" in metrics:
        quantized = metrics["quantize"]["results"]
        scores.update(quantized)
        gates.update(dict.fromkeys(quantized, metrics["quantize"]["gate"]))
    dense = scores.get("dense", {}).get("perplexity")
    oneshot = scores.get(context.models.method or "", {}).get("perplexity")
    sizes = _sizes(context, metrics)
    rows = []
    for name, figures in scores.items():
        gap = None
        if name.startswith("recovered") and dense and oneshot:
            gap = log_gap_recovered(dense, oneshot, figures["perplexity"])
        gate = gates.get(name)
        rows.append(
            {
                "name": name,
                "label": _label(name, context),
                "perplexity": figures["perplexity"],
                "kl": figures["kl"],
                "top1_agreement": figures["top1_agreement"],
                "num_tokens": figures.get("num_tokens"),
                "window_tokens": figures.get("window_tokens"),
                "log_gap_recovered": gap,
                **sizes.get(name, {"disk_bytes": None, "packed_bytes": None}),
                "violations": gate["num_violations"]
                if gate and gate.get("num_layers", 1)
                else None,
                "zero_share": _zero_share(gate),
                "writing": figures.get("writing"),
            }
        )
    return rows


def _tasks(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """Scores on benchmark tasks: the evaluation's, and with them those of the quantised model.

    Where the two were made with other options or tasks, the evaluation's alone count.
    """
    found: list[dict[str, Any]] = [
        metrics[stage]["tasks"]
        for stage in ("evaluate", "quantize")
        if metrics.get(stage, {}).get("tasks")
    ]
    if len(found) < 2:
        return found[0] if found else None
    first, second = found
    names = [[(row["section"], row["name"]) for row in one["rows"]] for one in found]
    if first["settings"] != second["settings"] or names[0] != names[1]:
        return first
    rows = []
    for row, other in zip(first["rows"], second["rows"], strict=True):
        known = {entry["model"] for entry in row["scores"]}
        new = [entry for entry in other["scores"] if entry["model"] not in known]
        rows.append({**row, "scores": [*row["scores"], *new]})
    return {**first, "rows": rows}


def _zero_share(gate: dict[str, Any] | None) -> float | None:
    """Of all weights of a model, pruned or not; records before did not count them."""
    if not gate or "num_model_weights" not in gate:
        return None
    return float(gate["num_model_zeros"] / gate["num_model_weights"])


def _label(name: str, context: StageContext) -> str:
    scheme = quantized_as(name)
    if scheme is not None:
        made = context.models.made
        base = next(
            (words for stage, words in _MADE_BY.items() if stage in made),
            f"one-shot {context.models.method}",
        )
        return f"{base} + {scheme.upper()}"
    known = {
        "dense": "dense", "dropped": "dropped", "recovered": "recovered", "finetuned": "fine-tuned",
    }  # fmt: skip
    dense, sparse = context.models.dense, context.models.all_sparse()
    label = known.get(name, f"one-shot {name}")
    if name == "dense" and not sparse:
        found = read_sparsity(dense) or {}
        if found.get("pattern", DENSE) != DENSE:
            label = f"{found['pattern']} {found.get('method', 'given')}"  # by itself
    folder = {"dense": dense, **sparse}.get(name)
    return " + ".join([label, *(_codes(folder) if folder else [])])


def _codes(folder: Path) -> list[str]:
    """Number formats of a packed folder's codes, such as INT4."""
    schemes = {layer.scheme for layer in packed_layers(folder).values() if layer.scheme.has_codes}
    return sorted({scheme.name.partition("-")[0].upper() for scheme in schemes})


def _sizes(context: StageContext, metrics: dict[str, Any]) -> dict[str, dict[str, int | None]]:
    """Bytes of each model's weight files, and of the packed form where one was written."""
    models = context.models
    folders = {"dense": models.dense, **models.all_sparse()}
    # One-shot models are not packed into files: theirs is the size of the packed tensors.
    packed = {
        **{**models.metrics, **metrics}.get("prune", {}).get("packed_bytes", {}),
        **metrics.get("export", {}).get("packed_bytes", {}),
    }
    sizes: dict[str, dict[str, int | None]] = {}
    for name, folder in folders.items():
        files = folder.glob("model*.safetensors")
        sizes[name] = {
            "disk_bytes": sum(path.stat().st_size for path in files),
            "packed_bytes": packed.get(name),
        }
    if "quantize" in metrics:
        size = metrics["quantize"]["packed_bytes"]
        for name in metrics["quantize"]["results"]:
            sizes[name] = {"disk_bytes": size, "packed_bytes": size}
    return sizes


def show(summary: dict[str, Any]) -> None:
    """Print the tables of a run to stdout."""
    # rich and the tables made of it: a run that fails early does without them
    from jobs.reporting.tables import print_tables, summary_tables

    print_tables(lambda width: summary_tables(summary, width))
