"""What the report page says of pruning, layer by layer: plain values for the template.

Decides what is shown and what is left out; the drawings come from `layer_charts` and `bars`. A
figure that the records lack leaves its plot out.
"""

from __future__ import annotations

from typing import Any

from jobs.reporting import units
from jobs.reporting.bars import phase_chart, token_chart
from jobs.reporting.layer_charts import LayerMap, depth_chart, layer_map
from jobs.reporting.layers import (
    ILL_CONDITIONED,
    Record,
    by_method,
    dead_columns,
    drawable,
    main_method,
    phase_seconds,
    raised_damping,
    rank,
    shared_inputs,
)
from jobs.reporting.svg import Scale
from sparsify.pruning.progress import FEW_TOKENS, PHASES

_NUM_WORST_LAYERS = 10

_PHASE_WORDS = {
    "load": "read weights",
    "statistics": "calibration statistics",
    "reduce": "add up over workers",
    "factor": "factor Hessians",
    "solve": "solve layers",
    "gather": "gather rows",
    "forward": "forward pruned blocks",
    "write": "write weights",
    "other": "all the rest",
}


def pruning_sections(summary: dict[str, Any]) -> dict[str, Any]:
    """The sections on pruning, by name; None where the summary has nothing for one.

    layers: error by layer. kept: large weights kept. calibration: tokens per column, condition,
    damping and dead columns. sparsity: zeros by layer. phases: where the time went.
    """
    layers = summary.get("layers") or []
    groups = by_method(layers)
    main = main_method(summary.get("run") or {}, groups)
    quantization = summary.get("quantization") or {}
    num_blocks = len({r["block"] for r in [*layers, *(quantization.get("layers") or [])]})
    seconds = phase_seconds(summary.get("pruning") or [], layers)
    phases = phase_chart(seconds, summary.get("results") or [], main)
    sparsity = None
    if main is not None:
        sparsity = layer_map(
            main, groups[main], "sparsity", lambda value: value, lambda v: units.percent(v)
        )
    return {
        "main": main,
        "is_wide": num_blocks > 12,
        "layers": _error_section(groups, main, quantization),
        "kept": depth_chart(
            "share of large weights kept", groups, "large_kept", _share,
            main=main, is_share=True,
        ),
        "calibration": _calibration_section(groups, main),
        "sparsity": sparsity,
        "phases": phases,
        "phase_words": [
            (phase, _PHASE_WORDS[phase])
            for phase in (*PHASES, "other")
            if phases is not None and f"phase-{phase}" in phases.tones
        ],
    }  # fmt: skip


def _share(value: float | None) -> str:
    """A share of large weights: 98.2 %, 99.97 % near the end, where the differences are small."""
    if units.is_finite(value) and 0.999 <= value < 1:
        return units.percent(value, 2)
    return units.percent(value)


def _short(value: float | None) -> str:
    return units.significant(value, 2)


def _rounded(value: float | None) -> str:
    """Two digits and zeros: 11,000, 1.3e7; for figures of which only the size matters."""
    return _short(float(f"{value:.1e}") if units.is_finite(value) else value)


def _error_opacity(layers: list[Record]) -> tuple[Any, list[str]]:
    """Shade of an error on one logarithmic scale for all maps, and the labels of its two ends."""
    positive = [value for value in drawable(layers, "relative_error") if value > 0]
    if not positive:
        return (lambda value: 0.0), []
    scale = Scale.over(positive, is_log=True)
    ends = [_short(min(positive)), _short(max(positive))]
    return (lambda value: scale(value) if value > 0 else 0.0), ends


def _error_section(
    groups: dict[str, list[Record]], main: str | None, quantization: dict[str, Any]
) -> dict[str, Any] | None:
    """The error over depth, maps of it per method, and the layers with the largest."""
    quantized = quantization.get("layers") or []
    if not groups and not quantized:
        return None
    every = [layer for layers in groups.values() for layer in layers]
    opacity, ends = _error_opacity([*every, *quantized])

    def error_map(heading: str, rows: list[Record]) -> LayerMap:
        return layer_map(heading, rows, "relative_error", opacity, _short)

    maps = {name: error_map(name, layers) for name, layers in groups.items()}
    shown = [maps.pop(main)] if main is not None else []
    if quantized:
        method = str(quantization.get("method") or "quantized").upper()
        scheme = str(quantization.get("scheme") or "").upper()
        shown.append(error_map(f"{method} {scheme}".strip(), quantized))
    return {
        "depth": depth_chart("relative error", groups, "relative_error", _short, main=main),
        "maps": shown,
        "other_maps": list(maps.values()),
        "ends": ends,
        "worst": _worst_layers(groups[main]) if main is not None else None,
    }


def _calibration_section(
    groups: dict[str, list[Record]], main: str | None
) -> dict[str, Any] | None:
    """How far the statistics of the main method can be trusted.

    Where it has none, those of the first method that has some are shown.
    """

    def having(key: str) -> tuple[str, list[Record]]:
        names = [main, *groups] if main is not None else []
        name = next((n for n in names if n and drawable(groups[n], key)), main or "")
        return name, groups.get(name, [])

    tokens_of, layers = having("tokens_per_column")
    tokens = token_chart(layers)
    condition_of, layers = having("condition")
    condition = depth_chart(
        "condition", shared_inputs(layers, "condition"), "condition", _rounded,
        warn_above=ILL_CONDITIONED,
    )  # fmt: skip
    damping_of, layers = having("damping")
    damping, sentence = None, ""
    values = drawable(layers, "damping")
    if values and raised_damping(layers):
        damping = depth_chart("damping", shared_inputs(layers, "damping"), "damping", _short)
    elif values:
        sentence = f"{units.significant(values[0])} in every layer, under {damping_of}"
    dead = dead_columns([layer for layers in groups.values() for layer in layers])
    if tokens is None and condition is None and damping is None and not dead:
        return None
    return {
        "tokens": tokens,
        "tokens_of": tokens_of,
        "few": units.count(FEW_TOKENS),
        "condition": condition,
        "condition_of": condition_of,
        "ill": _rounded(ILL_CONDITIONED),
        "damping": damping,
        "damping_of": damping_of,
        "damping_sentence": sentence,
        "dead": [
            f"{name}: {units.count(number)}" + (f" of {units.count(all_)}" if all_ else "")
            for name, number, all_ in dead
        ],
    }


def _worst_layers(layers: list[Record]) -> dict[str, Any]:
    """Headings and rows of the layers with the largest error: all that is known of them."""
    worst = sorted(layers, key=lambda layer: -rank(layer.get("relative_error")))
    worst = worst[:_NUM_WORST_LAYERS]
    shapes = [" × ".join(str(n) for n in layer.get("shape") or []) for layer in worst]
    columns = [("Shape", "", shapes)]
    for heading, unit, key, spell in (
        ("Relative error", "", "relative_error", units.significant),
        ("Error", "per token", "error", units.significant),
        ("Large kept", "", "large_kept", _share),
        ("Sparsity", "", "sparsity", units.percent),
        ("Damping", "", "damping", units.significant),
        ("Condition", "", "condition", _rounded),
        ("Dead columns", "", "num_dead_columns", units.count),
        ("Tokens", "", "num_tokens", units.count),
        ("Tokens", "per column", "tokens_per_column", units.significant),
    ):
        columns.append((heading, unit, [spell(layer.get(key)) for layer in worst]))
    columns.append(("Time", "", [_time(layer.get("seconds")) for layer in worst]))
    columns = [column for column in columns if set(column[2]) - {units.MISSING, ""}]
    return {
        "columns": [(heading, unit) for heading, unit, _ in columns],
        "rows": [
            (str(layer["name"]), [cells[i] for _, _, cells in columns], "")
            for i, layer in enumerate(worst)
        ],
    }


def _time(seconds: Record | None) -> str:
    """The sum of a layer's phases."""
    known = [value for value in (seconds or {}).values() if units.is_drawable(value)]
    return units.duration(sum(known)) if known else units.MISSING
