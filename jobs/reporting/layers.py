"""What the records of pruned layers say: groups, limits, warnings, and metrics for the tracker.

Plain values in, plain values out; knows nothing of HTML. A record is a dict with method, name and
block; every other field may be missing, because earlier versions wrote fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jobs.reporting import units

Record = dict[str, Any]

ILL_CONDITIONED = 1e6
"""Condition from which float32, with its seven digits, leaves hardly one that can be trusted."""

_MOST_NAMED = 3  # layers in a warning


def by_method(layers: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each method, methods in the order in which they ran."""
    groups: dict[str, list[Record]] = {}
    for layer in layers:
        groups.setdefault(str(layer["method"]), []).append(layer)
    return groups


def main_method(run: Record, groups: dict[str, list[Record]]) -> str | None:
    """The method whose model the later stages got; the first one where the run does not say."""
    return run["method"] if run.get("method") in groups else next(iter(groups), None)


def drawable(layers: Iterable[Record], key: str) -> list[float]:
    """The values of `key` that a scale can hold."""
    return [value for layer in layers if units.is_drawable(value := layer.get(key))]


def rank(value: float | None) -> float:
    """Order for 'largest': a value that is not finite counts as worse than any number."""
    return value if units.is_finite(value) else math.inf


def linear_kind(name: str, block: int) -> str:
    """The place of a linear layer in its block: 'self_attn.q_proj'. Numbers (experts) become *.

    The part of the dotted name after the block's number; the last part where there is no number.
    """
    parts = name.split(".")
    has_number = str(block) in parts[:-1]
    inner = parts[parts.index(str(block)) + 1 :] if has_number else parts[-1:]
    return ".".join("*" if part.isdigit() else part for part in inner)


def short_kinds(layers: Iterable[Record]) -> dict[str, str]:
    """Kind -> the last part of its name where that is unambiguous, the whole kind elsewhere."""
    kinds = list(dict.fromkeys(linear_kind(layer["name"], layer["block"]) for layer in layers))
    last = [kind.split(".")[-1] for kind in kinds]
    return {
        kind: short if last.count(short) == 1 else kind
        for kind, short in zip(kinds, last, strict=True)
    }


def shared_inputs(layers: list[Record], key: str) -> dict[str, list[Record]]:
    """Records by input, as far as `key` shows it: 'q_proj, k_proj, v_proj' -> those of q_proj.

    Layers that receive one input have its statistics in common, so that kinds with the same values
    in all blocks say the same thing; each group is named after its kinds and holds the first's.
    """
    short = short_kinds(layers)
    of_kind: dict[str, list[Record]] = {kind: [] for kind in short}
    for layer in layers:
        of_kind[linear_kind(layer["name"], layer["block"])].append(layer)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for kind, members in of_kind.items():
        if drawable(members, key):
            values = sorted((m["block"], str(m.get(key))) for m in members)
            groups.setdefault(tuple(values), []).append(kind)
    return {
        ", ".join(short[kind] for kind in kinds): of_kind[kinds[0]] for kinds in groups.values()
    }


def dead_columns(layers: list[Record]) -> list[tuple[str, int, int | None]]:
    """(layer, columns that were always zero, columns in all), most first, over all methods."""
    found: dict[str, tuple[int, int | None]] = {}
    for layer in layers:
        number = layer.get("num_dead_columns")
        if units.is_finite(number) and number > found.get(layer["name"], (0, None))[0]:
            shape = layer.get("shape") or []
            found[layer["name"]] = int(number), shape[1] if len(shape) == 2 else None
    return sorted(
        ((name, dead, all_) for name, (dead, all_) in found.items()), key=lambda row: -row[1]
    )


def raised_damping(layers: list[Record]) -> list[Record]:
    """The layers of one method whose damping is above the smallest: it was not enough for them."""
    smallest = min(drawable(layers, "damping"), default=0.0)
    return [
        layer
        for layer in layers
        if units.is_drawable(value := layer.get("damping")) and value > smallest
    ]


def phase_seconds(pruning: list[Record], layers: list[Record]) -> dict[str, dict[str, float]]:
    """Method -> phase -> seconds, and 'other' for what the whole took beyond its phases.

    Args:
        pruning: the summary's section of that name: method, duration_s, seconds.
        layers: its layers, whose seconds are added up for a method that `pruning` lacks.
    """
    found: dict[str, dict[str, float]] = {}
    for method, members in by_method(layers).items():
        found[method] = _usable({
            phase: sum(_usable(layer.get("seconds")).get(phase, 0.0) for layer in members)
            for phase in dict.fromkeys(p for layer in members for p in layer.get("seconds") or {})
        })  # fmt: skip
    for row in pruning:
        phases = _usable(row.get("seconds")) or found.get(str(row["method"]), {})
        whole = row.get("duration_s")
        rest = whole - sum(phases.values()) if units.is_drawable(whole) else 0.0
        found[str(row["method"])] = phases | ({"other": rest} if rest > 0 else {})
    return {method: phases for method, phases in found.items() if sum(phases.values()) > 0}


def _usable(seconds: Record | None) -> dict[str, float]:
    return {
        str(phase): value
        for phase, value in (seconds or {}).items()
        if units.is_drawable(value) and value >= 0
    }


def _named(layers: list[Record]) -> str:
    names = list(dict.fromkeys(str(layer["name"]) for layer in layers))
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def warnings(run: Record, layers: list[Record]) -> list[str]:
    """What in the layers' figures a reader must not miss, worst first.

    Without what the stage itself warned of, which is in the summary's `warnings`.
    """
    found: list[str] = []
    broken = [r for r in layers if not units.is_finite(r.get("relative_error"))]
    if broken:
        broken = sorted(broken, key=lambda layer: str(layer["name"]))
        found.append(f"No finite reconstruction error in {_named(broken)}.")
    groups = by_method(layers)
    main = main_method(run, groups)
    if main is None:
        return found
    members = groups[main]
    useless = [r for r in members if _above(r, "relative_error", 1.0)]
    if useless:
        found.append(
            f"{main}: the relative error is above 1 in {_named(useless)}, which is worse than no "
            "output at all; see Error by layer."
        )
    raised = raised_damping(members)
    if raised:
        most = max(raised, key=lambda layer: layer["damping"])
        found.append(
            f"{main}: the Hessian needed more damping than was asked for, up to "
            f"{units.significant(most['damping'], 2)}, in {_named([most, *raised])}."
        )
    poor = [r for r in members if _above(r, "condition", ILL_CONDITIONED)]
    if poor:
        worst = max(poor, key=lambda layer: layer["condition"])
        found.append(
            f"{main}: condition {units.significant(worst['condition'], 2)} in "
            f"{_named([worst, *poor])}, too much for float32; raise prune.damping."
        )
    return found


def _above(layer: Record, key: str, limit: float) -> bool:
    value = layer.get(key)
    return units.is_finite(value) and value > limit
