"""Curves over the training steps: loss and its parts, learning rate, gradient, forecast."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from jobs.reporting import units
from jobs.reporting.svg import Scale, areas, axis_below, end_label, hover_strips, plot, polylines

Step = dict[str, Any]

_MOST_POINTS = 400  # of one curve: more cannot be told apart and only make the page heavy

_FEW_POINTS = 20  # of a curve: no running mean is drawn over so few

_FORECAST_HEIGHT = 170

_PARTS = {
    "kl": ("KL to the dense model", "nats per token"),
    "ce": ("cross-entropy", "nats per token"),
    "square_head": ("SquareHead", "no unit"),
}


@dataclass(frozen=True)
class Panel:
    """One curve over the training steps: its caption with the unit, and the drawing."""

    caption: str
    svg: Markup


def thin_steps(steps: list[Step], most: int = _MOST_POINTS) -> list[Step]:
    """At most `most` steps: each the mean of as many consecutive steps as that takes.

    step and num_tokens are those of the last step of each group; a value that is missing or not
    drawable anywhere in a group is left missing there, so that a gap stays a gap.
    """
    size = math.ceil(len(steps) / most)
    if size <= 1:
        return steps
    thinned = []
    for start in range(0, len(steps), size):
        group = steps[start : start + size]
        merged = dict(group[-1])
        for key in merged.keys() - {"step", "num_tokens"}:
            values = [v for step in group if units.is_drawable(v := step.get(key))]
            merged[key] = statistics.fmean(values) if len(values) == len(group) else None
        thinned.append(merged)
    return thinned


def recovery_panels(recovery: dict[str, Any]) -> list[Panel]:
    """Loss, the parts it is made of, learning rate and gradient norm, one above the other."""
    steps = _thinned(recovery)
    parts = [key for key in _PARTS if any(step.get(key) for step in recovery.get("steps") or [])]
    captions = {"loss": "Loss, weighted sum of its parts"}
    if len(parts) == 1:
        captions["loss"] = "Loss: {}, {}".format(*_PARTS[parts[0]])
    else:
        for key in parts:
            name, unit = _PARTS[key]
            captions[key] = f"{name[0].upper()}{name[1:]}, {unit}"
    captions |= {"learning_rate": "Learning rate", "grad_norm": "Gradient norm, before clipping"}
    wanted = [key for key in captions if any(units.is_drawable(s.get(key)) for s in steps)]
    return [_panel(captions[key], steps, key, last=key == wanted[-1]) for key in wanted]


def forecast_panel(recovery: dict[str, Any]) -> Panel | None:
    """The forecast that was made on the way, as a band over the KL that came of it.

    None where the record has no forecast, or one that only says why there is none.
    """
    forecast = recovery.get("forecast") or {}
    band = [p for p in forecast.get("band") or [] if all(units.is_drawable(v) for v in p)]
    steps = [step for step in _thinned(recovery) if units.is_drawable(step.get("kl"))]
    if len(band) < 2 or not steps:
        return None
    came = [v for v in _smoothed([step["kl"] for step in steps]) if v is not None]
    across = Scale.over([1.0, forecast["num_steps"]], is_log=False)
    up = Scale.over([*came, *(v for p in band for v in p[1:])], is_log=True, pad=0.06)
    xs = [across(p[0]) for p in band]
    curves = [
        *areas(xs, [(up(low), up(high)) for _, low, _, high in band], "band"),
        *polylines(xs, [up(middle) for _, _, middle, _ in band], "curve t2"),
        *polylines([across(step["step"]) for step in steps], map(up, came), "curve"),
    ]
    predicted, low, high = (forecast[key] for key in ("predicted", "low", "high"))
    text = units.significant(predicted)
    caption = (
        f"Forecast at step {units.count(forecast['last_step'])}: {text} at the end, "
        f"{100 * forecast['coverage']:g} % interval {units.significant(low)} to "
        f"{units.significant(high)}; dashed: its middle, shaded: the interval, solid: running mean "
        "of what came (log scale)"
    )
    svg = plot(
        "forecast and outcome", _FORECAST_HEIGHT, up, curves,
        marks=[end_label(predicted, text, up, _FORECAST_HEIGHT)],
        axis=_step_axis(across, _FORECAST_HEIGHT),
    )  # fmt: skip
    return Panel(caption, svg)


def curve_note(recovery: dict[str, Any]) -> str:
    """What the lines of `recovery_panels` are."""
    num_steps = len(recovery.get("steps") or [])
    size = math.ceil(num_steps / _MOST_POINTS)
    point = "each step" if size <= 1 else f"mean of {size} steps"
    if num_steps <= _FEW_POINTS:
        return f"Line: {point}; the number at its end is the last value."
    return f"Thin line: {point}. Thick line: running mean; the number at its end is its last value."


def _thinned(recovery: dict[str, Any]) -> list[Step]:
    return thin_steps(sorted(recovery.get("steps") or [], key=lambda step: float(step["step"])))


def _smoothed(values: list[float | None]) -> list[float | None]:
    """Centred running mean over a twentieth of the values, unless they are few; gaps stay."""
    if len(values) <= _FEW_POINTS:
        return values
    half = max(1, len(values) // 40)
    result: list[float | None] = []
    for i, value in enumerate(values):
        there = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        result.append(None if value is None else statistics.fmean(there))
    return result


def _panel(caption: str, steps: list[Step], key: str, *, last: bool) -> Panel:
    """A curve with its final value at its end; the axis of the steps is below the last panel."""
    height = {"loss": 230, "learning_rate": 56, "grad_norm": 56}.get(key, 84)
    values = [step[key] if units.is_drawable(step.get(key)) else None for step in steps]
    finite = [value for value in values if value is not None]
    is_rate = key == "learning_rate"  # set, not measured: exact, and zero is part of its scale
    up = Scale.over([0.0, *finite] if is_rate else finite, is_log=not is_rate, pad=0.06)
    numbers = [float(step["step"]) for step in steps]
    across = Scale.over(numbers, is_log=False)
    xs = [across(x) for x in numbers]
    shown = values if is_rate else _smoothed(values)
    curves: list[Markup] = []
    if shown is not values:
        curves += polylines(xs, [None if v is None else up(v) for v in values], "curve raw")
    curves += polylines(xs, [None if v is None else up(v) for v in shown], "curve")
    final = next(v for v in reversed(shown) if v is not None)
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(xs)), 1.0]
    marks = [
        end_label(final, units.significant(final), up, height),
        *hover_strips(edges, [_hover_text(step) for step in steps], height),
    ]
    label = f"{key.replace('_', ' ')} over {len(steps)} points"
    axis = _step_axis(across, height) if last else ()
    scale = "log scale" if up.is_log else "linear scale"
    return Panel(f"{caption} ({scale})", plot(label, height, up, curves, marks=marks, axis=axis))


def _step_axis(across: Scale, height: int) -> list[Markup]:
    whole = [tick for tick in across.ticks(5) if tick == int(tick)]
    return axis_below([(across(t), f"{int(t):,}") for t in whole], "optimizer step", height)


def _hover_text(step: Step) -> str:
    parts = [f"step {units.count(step.get('step'))}"]
    if step.get("num_tokens") is not None:
        parts.append(f"{units.count(step['num_tokens'])} tokens")
    for name in ("loss", "kl", "ce", "square_head", "learning_rate", "grad_norm"):
        if step.get(name) is not None:
            spelled = name.replace("_", " ").replace("kl", "KL").replace("ce", "CE")
            parts.append(f"{spelled} {units.significant(step[name])}")
    return "\n".join(parts)
