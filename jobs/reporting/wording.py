"""The sentences of the report page: the outcome, the path to it, and what must not be missed.

Only words; knows nothing of HTML.
"""

from __future__ import annotations

import re
from typing import Any

from jobs.reporting import units
from jobs.reporting.comparison import counted_states, final_perplexity
from jobs.reporting.comparison import label_of as label_in
from jobs.reporting.layers import warnings
from jobs.reporting.results import (
    find_result,
    is_plottable,
    is_recovered,
    label_of,
    quantized_as,
    times_dense,
)
from sparsify.pattern import DENSE

Words = list[tuple[str, str]]  # (text, tone); tone: "", "gain" or "loss"


def _at_pattern(run: dict[str, Any]) -> str:
    """' at 2:4', ' at 50 % unstructured sparsity', or nothing when the pattern is unknown."""
    text = str(run.get("pattern") or "").removeprefix(DENSE)
    kind, _, share = text.partition(":")
    if kind == "unstructured" and re.fullmatch(r"0?\.\d+", share):
        return f" at {units.percent(float(share), 0)} unstructured sparsity"
    return f" at {text}" if text else ""


def _sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def headline(summary: dict[str, Any]) -> Words:
    """The outcome in one sentence: what recovery won back, or what pruning cost, and the size."""
    run, results = summary.get("run") or {}, summary.get("results") or []
    words = _quality_words(run, results)
    if not words:
        num_layers = len({layer["name"] for layer in summary.get("layers") or []})
        if num_layers:
            return [(f"Pruned {num_layers:,} layers{_at_pattern(run)}, nothing measured yet", "")]
        return [(f"{run.get('name') or 'This run'}: nothing measured yet", "")]
    return words + _size_words(results)


def comparison_headline(comparison: dict[str, Any]) -> Words:
    """The best of a sweep's runs, and how good it is; see `comparison.compare_folder`."""
    runs = comparison["runs"]
    best = next((run for run in runs if run["run"] == comparison["best"]), None)
    if best is None:
        return [(f"{comparison['name']}: {counted_states(comparison)}", "")]
    words: Words = [(f"Best of {len(runs)}: ", ""), (label_in(comparison, best), "gain")]
    final = final_perplexity(best)
    if final is not None:
        return [*words, (f", perplexity {units.perplexity(final)}", "")]
    return [*words, (f", median error {units.significant(best['median_error'])}", "")]


def _quality_words(run: dict[str, Any], results: list[dict[str, Any]]) -> Words:
    at = _at_pattern(run)
    dense, one_shot = find_result(results, "dense"), find_result(results, run.get("method"))
    trained = [row for row in results if is_recovered(row["name"])]
    in_full = [row for row in trained if quantized_as(row["name"]) is None]
    recovered = next(reversed(in_full or trained), None)
    share = recovered.get("log_gap_recovered") if recovered else None
    if share is not None and units.is_finite(share):
        if share < 0:
            return [("Recovery ", ""), ("widened", "loss"), (f" the perplexity gap{at}", "")]
        part = units.percent(share, 0)
        return [("Recovered ", ""), (part, "gain"), (f" of the perplexity gap{at}", "")]
    row = recovered or one_shot or next((r for r in results if r is not dense), None)
    if row is None:
        if dense is None:
            return []
        name = _sentence_case(label_of(dense))
        return [(f"{name} model: perplexity {units.perplexity(dense.get('perplexity'))}", "")]
    if not is_plottable(row):
        return [
            (f"{_sentence_case(label_of(row))}{at}: perplexity is ", ""),
            ("not a finite number", "loss"),
        ]
    words: Words = [(f"{_sentence_case(label_of(row))}{at}: perplexity ", "")]
    words.append((units.perplexity(row["perplexity"]), "gain" if recovered else "loss"))
    times = times_dense(row, dense)
    if times is not None:
        words.append((f", {units.ratio(times)} dense", ""))
    return words


def training_words(figures: dict[str, Any]) -> str:
    """How far a training went, and what became of its loss: of the record of its stage."""
    first, last = figures["steps"][0], figures["steps"][-1]
    losses = " to ".join(
        units.MISSING if step["loss"] is None else units.significant(step["loss"])
        for step in (first, last)
    )
    return f"{last['step']} steps, {units.count(figures['num_tokens'])} tokens, loss {losses}"


def _size_words(results: list[dict[str, Any]]) -> Words:
    """The smallest packed file against the dense checkpoint: ', INT4 file 5.3× smaller'."""
    packed = [r for r in results if units.is_finite(r.get("packed_bytes")) and r["packed_bytes"]]
    dense = find_result(results, "dense")
    if not packed or dense is None or not dense.get("disk_bytes"):
        return []
    smallest = min(packed, key=lambda row: row["packed_bytes"])
    factor = dense["disk_bytes"] / smallest["packed_bytes"]
    if factor <= 1:
        return []
    name = (quantized_as(smallest["name"]) or "packed").replace("int", "INT")
    return [(f", {name} file ", ""), (f"{factor:.1f}×", "gain"), (" smaller", "")]


def lead(run: dict[str, Any], results: list[dict[str, Any]], recovery: dict[str, Any]) -> str:
    """The path of perplexity through the run, in one or two sentences."""
    dense, one_shot = find_result(results, "dense"), find_result(results, run.get("method"))
    after = [row for row in results if is_recovered(row["name"])]
    if one_shot is None or not is_plottable(one_shot):
        return ""
    text = f"One-shot pruning with {run.get('method')} "
    if run.get("method") == "dropped":
        text = "Dropping layers "
    if dense is not None and is_plottable(dense):
        text += f"took perplexity from {units.perplexity(dense['perplexity'])} "
        text += f"to {units.perplexity(one_shot['perplexity'])}"
    else:
        text += f"gave perplexity {units.perplexity(one_shot['perplexity'])}"
    if after:
        first, *others = after
        tokens = recovery.get("num_tokens")
        trained = f"training on {units.count(tokens)} tokens" if tokens else "training"
        text += f"; {trained} brought it to {units.perplexity(first.get('perplexity'))}"
        also = [f"{label_of(row)}: {units.perplexity(row.get('perplexity'))}" for row in others]
        text += f" ({', '.join(also)})" if also else ""
    checked = [row for row in results if row.get("violations") is not None]
    is_dense = run.get("pattern") == DENSE
    if checked and not is_dense and not any(row["violations"] for row in checked):
        text += f". Every pruned layer holds {run.get('pattern') or 'the pattern'} exactly"
    return text + "."


def alerts(
    run: dict[str, Any],
    results: list[dict[str, Any]],
    layers: list[dict[str, Any]],
    recovery: dict[str, Any],
) -> list[str]:
    """What in the numbers themselves a reader must not miss."""
    found: list[str] = []
    for row in results:
        if row.get("violations"):
            found.append(
                f"{label_of(row)}: {units.count(row['violations'])} violations of "
                f"{run.get('pattern') or 'the pattern'}; the model cannot be deployed as sparse."
            )
        if not is_plottable(row):
            value = units.perplexity(row.get("perplexity"))
            found.append(f"{label_of(row)}: perplexity is {value}, which is no usable result.")
    found += warnings(run, layers)
    lost = [s for s in recovery.get("steps") or [] if not units.is_finite(s.get("loss"))]
    if lost:
        found.append(
            f"Recovery training: the loss is not finite at {len(lost):,} steps, "
            f"first at step {units.count(lost[0].get('step'))}."
        )
    return found
