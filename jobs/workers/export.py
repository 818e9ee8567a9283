"""On one worker: the exported folders with their model cards, and how fast they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from cluster.runtime.worker import WorkerContext
from jobs.harness.words import NOTE, card_results, manner, partial
from jobs.runs.folder import disk_errors
from jobs.workers.speed import measure_speed
from sparsify.formats.basis import carry_rotation
from sparsify.formats.kinds import Export, Written, get_format
from sparsify.formats.kinds.packed import NAME as PACKED
from sparsify.formats.source import masks_of_source, open_source
from sparsify.formats.sparse_folder import described, model_name, read_sparsity, write_sparsity
from sparsify.integrations.quantizer import check_fits
from sparsify.models.load import load_tokenizer
from sparsify.packed.writer import GIGABYTE


def export_on_worker(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any]:
    """One task: write each format, read back and checked, with model cards."""
    torch.set_num_threads(context.num_threads)
    config, folder = payload["config"], payload["folder"]
    source = open_source(payload["source"], config.export.dtype)
    masks, pattern = masks_of_source(source, config.prune.pattern, config.prune.skip)
    if "packed" in config.export.formats:
        check_fits(source.model, masks, {name: source.shape(name) for name in source.names()},
                   pattern)  # fmt: skip
    before = read_sparsity(payload["source"]) or {}
    provenance = _public(before.get("provenance", {}), payload["dense"])
    export = Export(
        source, masks, pattern, load_tokenizer(payload["source"]), folder,
        int(config.export.shard_size_gb * GIGABYTE), payload["packed"],
    )  # fmt: skip
    found: list[Written] = []
    with disk_errors(folder):
        for name in config.export.formats:
            found += get_format(name).write(export)
        for written in found:
            path = folder / written.name
            carry_rotation(payload["source"], path)
            method = before.get("method", "given")
            write_sparsity(path, masks, str(pattern), method, provenance)
            name = payload["quantized"] if written.is_quantized else payload["name"]
            card = model_card(
                written, model_name(payload["dense"]), payload["results"], str(pattern),
                provenance, described(read_sparsity(path) or {}),
                tasks_part(payload["tasks"], name, written.name),
            )  # fmt: skip
            (path / "README.md").write_text(card, encoding="utf-8")
    sizes = {written.name: written.num_bytes for written in found}
    return {
        "gate": {written.name: written.gate for written in found},
        "packed_bytes": {payload["name"]: sizes[PACKED]} if PACKED in sizes else {},
        "dtype": source.dtype_name,
        "speed": measure_speed(
            context,
            payload["dense"],
            [folder / name for name in sizes],
            source.dtype_name,
            config.export.max_timed_gb,
        ),
    }


def _public(provenance: dict[str, Any], dense: Path) -> dict[str, Any]:
    """Provenance without paths of this machine: the dense model goes by name and hash."""
    kept = {key: value for key, value in provenance.items() if key != "dense_path"}
    return {"dense_model": model_name(dense), **kept}


TasksPart = tuple[str, list[str]]
"""what a card has of benchmark tasks: lines for its front matter, and for its text"""


def tasks_part(tasks: dict[str, Any] | None, model: str | None, folder: str) -> TasksPart:
    """Scores of a model on benchmark tasks for its card: as the Hub reads them, and as a table.

    Args:
        tasks: of the summary; None where none were asked.
        model: name of its result.
        folder: name of the exported folder.
    """
    results, rows = card_results(tasks, str(model))
    if tasks is None or not rows:
        return "", []
    index = {"model-index": [{"name": folder, "results": results}]}
    front = yaml.safe_dump(index, sort_keys=False, allow_unicode=True) if results else ""
    table = ["| task | metric | dense | this model | % of dense |", "|---|---|---|---|---|"]
    table += [f"| {' | '.join(row)} |" for row in rows]
    said = [text for text in (partial(tasks), manner(tasks), NOTE) if text]
    return front, ["", *table, "", *said]


def model_card(
    written: Written, dense: str, results: list[dict[str, Any]], pattern: str,
    provenance: dict[str, Any], zeros: str | None = None, tasks: TasksPart = ("", []),
) -> str:  # fmt: skip
    """A model card: what it is, how it was made, how good it is, how to load it.

    Args:
        written: the folder.
        dense: name of the dense model.
        results: rows of the summary.
        pattern: of the zeros.
        provenance: for the list at the end.
        zeros: a sentence on how much of the model they are.
        tasks: of `tasks_part`.
    """
    what = written.what if zeros is None else f"{written.what} {zeros}"
    lines = [
        "---", "library_name: transformers", f'tags: [sparse, "{pattern}", twofour]',
        f"{tasks[0]}---",
        f"# {dense}, {pattern} sparse", "", what, "",
        "| model | perplexity | KL to dense |", "|---|---|---|",
    ]  # fmt: skip
    for row in results:
        kl = "" if row["kl"] is None else f"{row['kl']:.4f}"
        lines.append(f"| {row['label']} | {row['perplexity']:.4g} | {kl} |")
    facts = [f"- {key}: {value}" for key, value in provenance.items()]
    lines += [
        "", "Perplexity on held-out text of the run that made it; compare only within this table.",
        *tasks[1], "", "```python", written.load, "```", "", "Provenance:", "", *facts,
        "- sparsity.json lists pattern, mask hash and kept weights of every layer.", "",
    ]  # fmt: skip
    return "\n".join(lines)
