"""The curves of recovery training on the report page, as inline SVG.

Colour comes from CSS variables, so that one drawing serves light and dark. Every mark carries a
<title>, which browsers show on hover and screen readers read out.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from jobs import _format
from jobs._svg import Scale, element, pct, polylines, tick_label

_MOST_POINTS = 400  # of one curve: more cannot be told apart and only make the page heavy
_FEW_POINTS = 20  # of a curve: no running mean is drawn over so few


@dataclass(frozen=True)
class Panel:
    """One curve over the training steps: its caption with the unit, and the drawing."""

    caption: str
    svg: Markup


def thin_steps(steps: list[dict[str, Any]], most: int = _MOST_POINTS) -> list[dict[str, Any]]:
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
            values = [v for step in group if _format.is_drawable(v := step.get(key))]
            merged[key] = statistics.fmean(values) if len(values) == len(group) else None
        thinned.append(merged)
    return thinned


def _smoothed(values: list[float | None], half_window: int) -> list[float | None]:
    """Centred running mean over what is there; a gap stays a gap."""
    result: list[float | None] = []
    for i, value in enumerate(values):
        near = values[max(0, i - half_window) : i + half_window + 1]
        there = [v for v in near if v is not None]
        result.append(None if value is None else statistics.fmean(there))
    return result


def _hover_text(step: dict[str, Any]) -> str:
    parts = [f"step {_format.count(step.get('step'))}"]
    if step.get("num_tokens") is not None:
        parts.append(f"{_format.count(step['num_tokens'])} tokens")
    names = ("loss", "kl", "ce", "square_head", "learning_rate", "grad_norm")
    for name in names:
        if step.get(name) is not None:
            spelled = name.replace("_", " ").replace("kl", "KL").replace("ce", "CE")
            parts.append(f"{spelled} {_format.significant(step[name])}")
    return "\n".join(parts)


def _curve(
    steps: list[dict[str, Any]], key: str, height: int, *, is_log: bool, smooth: bool, last: bool
) -> Markup | None:
    """One panel: grid, curve, the final value at its end, and a hover strip per step."""
    values = [step[key] if _format.is_drawable(step.get(key)) else None for step in steps]
    finite = [value for value in values if value is not None]
    if not finite:
        return None
    numbers = [float(step["step"]) for step in steps]
    across = Scale.over(numbers, is_log=False)
    up = Scale.over(finite if is_log else [0.0, *finite], is_log=is_log, pad=0.06)
    xs = [across(x) for x in numbers]
    marks: list[Markup] = []
    for tick in up.ticks(5 if height > 120 else 3):
        y = height * (1 - up(tick))
        marks.append(element("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        marks.append(element("text", tick_label(tick), class_="end", x="-8", y=y + 4))
    shown = values
    curves: list[Markup] = []
    if smooth and len(values) > _FEW_POINTS:
        shown = _smoothed(values, max(1, len(values) // 40))
        curves = polylines(xs, [None if v is None else up(v) for v in values], "curve raw")
    curves += polylines(xs, [None if v is None else up(v) for v in shown], "curve")
    marks.append(
        element(
            "svg", *curves, width="100%", height=height, viewBox="0 0 1000 1000",
            preserveAspectRatio="none",
        )
    )  # fmt: skip
    marks.append(_end_label([v for v in shown if v is not None][-1], up, height))
    marks.extend(_hover_strips(steps, xs, height))
    if last:
        marks.extend(_step_axis(across, height))
    label = f"{key.replace('_', ' ')} over {len(steps)} points"
    total = height + (40 if last else 6)
    return element("svg", *marks, class_="plot", role="img", aria_label=label, height=total)


def _end_label(value: float, up: Scale, height: int) -> Markup:
    y = min(height - 2.0, max(10.0, height * (1 - up(value)) + 4))
    return element("text", _format.significant(value), class_="value", x="100%", dx="8", y=y)


def _hover_strips(steps: list[dict[str, Any]], xs: list[float], height: int) -> list[Markup]:
    """An invisible strip per step, as wide as the step is far from its neighbours."""
    strips = []
    for i, step in enumerate(steps):
        left = 0.0 if i == 0 else (xs[i - 1] + xs[i]) / 2
        right = 1.0 if i == len(steps) - 1 else (xs[i] + xs[i + 1]) / 2
        title = element("title", _hover_text(step))
        strips.append(
            element("rect", title, class_="hit", x=pct(left), width=pct(right - left),
                    height=height)
        )  # fmt: skip
    return strips


def _step_axis(across: Scale, height: int) -> list[Markup]:
    marks = []
    for tick in across.ticks(5):
        if tick == int(tick):
            label = f"{int(tick):,}"
            marks.append(
                element("text", label, class_="middle", x=pct(across(tick)), y=height + 17)
            )
    marks.append(element("text", "optimizer step", class_="end", x="100%", y=height + 35))
    return marks


def recovery_panels(recovery: dict[str, Any]) -> list[Panel]:
    """Loss, the parts it is made of, learning rate and gradient norm, one above the other."""
    steps = sorted(recovery.get("steps") or [], key=lambda step: float(step["step"]))
    if not steps:
        return []
    thinned = thin_steps(steps)
    wanted: list[tuple[str, str, int, bool, bool]] = []
    parts = [key for key in ("kl", "ce", "square_head") if any(step.get(key) for step in steps)]
    words = {"kl": "KL to the dense model", "ce": "cross-entropy", "square_head": "SquareHead"}
    if len(parts) == 1:
        caption = f"Loss: {words[parts[0]]}, nats per token"
        if parts[0] == "square_head":
            caption = "Loss: SquareHead, no unit"
        wanted.append(("loss", caption, 230, True, True))
    else:
        wanted.append(("loss", "Loss, weighted sum of its parts", 230, True, True))
        for key in parts:
            unit = "no unit" if key == "square_head" else "nats per token"
            wanted.append((key, f"{words[key][0].upper()}{words[key][1:]}, {unit}", 84, True, True))
    wanted.append(("learning_rate", "Learning rate", 56, False, False))
    wanted.append(("grad_norm", "Gradient norm, before clipping", 56, True, True))
    wanted = [item for item in wanted if any(_format.is_drawable(s.get(item[0])) for s in thinned)]
    panels = []
    for i, (key, caption, height, is_log, smooth) in enumerate(wanted):
        positive = all(s[key] > 0 for s in thinned if _format.is_drawable(s.get(key)))
        axis = "log scale" if is_log and positive else "linear scale"
        svg = _curve(thinned, key, height, is_log=is_log, smooth=smooth, last=i == len(wanted) - 1)
        if svg is not None:
            panels.append(Panel(f"{caption} ({axis})", svg))
    return panels


def forecast_panel(recovery: dict[str, Any]) -> Panel | None:
    """The forecast that was made on the way, as a band over the KL that came of it.

    None where the record has no forecast, or one that only says why there is none.
    """
    forecast = recovery.get("forecast") or {}
    steps = sorted(recovery.get("steps") or [], key=lambda step: float(step["step"]))
    band = [p for p in forecast.get("band") or [] if all(_format.is_drawable(v) for v in p)]
    thinned = [s for s in thin_steps(steps) if _format.is_drawable(s.get("kl"))]
    if len(band) < 2 or not thinned:
        return None
    height = 170
    values = [step["kl"] for step in thinned]
    smooth = _smoothed(values, max(1, len(values) // 40)) if len(values) > _FEW_POINTS else values
    drawn = [v for v in smooth if v is not None]
    across = Scale.over([1.0, forecast["num_steps"]], is_log=False)
    up = Scale.over([*drawn, *(v for p in band for v in p[1:])], is_log=True, pad=0.06)
    outline = [(x, low) for x, low, _, _ in band] + [(x, high) for x, _, _, high in band[::-1]]
    corners = " ".join(f"{1000 * across(x):.1f},{1000 * (1 - up(y)):.1f}" for x, y in outline)
    middle = polylines([across(p[0]) for p in band], [up(p[2]) for p in band], "curve t2")
    happened = polylines([across(s["step"]) for s in thinned], [up(v) for v in drawn], "curve")
    marks: list[Markup] = []
    for tick in up.ticks(5):
        y = height * (1 - up(tick))
        marks.append(element("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        marks.append(element("text", tick_label(tick), class_="end", x="-8", y=y + 4))
    area = element("polygon", class_="band", points=corners)
    marks.append(
        element(
            "svg", area, *middle, *happened, width="100%", height=height, viewBox="0 0 1000 1000",
            preserveAspectRatio="none",
        )
    )  # fmt: skip
    marks.append(_end_label(forecast["predicted"], up, height))
    marks.extend(_step_axis(across, height))
    svg = element(
        "svg", *marks, class_="plot", role="img", aria_label="forecast and outcome",
        height=height + 40,
    )  # fmt: skip
    return Panel(_forecast_caption(forecast), svg)


def _forecast_caption(forecast: dict[str, Any]) -> str:
    step, predicted, low, high = (
        _format.count(forecast["last_step"]),
        *(_format.significant(forecast[key]) for key in ("predicted", "low", "high")),
    )
    share = f"{100 * forecast['coverage']:g} %"
    return (
        f"Forecast at step {step}: {predicted} at the end, {share} interval {low} to {high}; "
        "dashed: its middle, shaded: the interval, solid: running mean of what came (log scale)"
    )


def curve_note(recovery: dict[str, Any]) -> str:
    """What the lines of `recovery_panels` are."""
    num_steps = len(recovery.get("steps") or [])
    size = math.ceil(num_steps / _MOST_POINTS)
    point = "each step" if size <= 1 else f"mean of {size} steps"
    if num_steps <= _FEW_POINTS:
        return f"Line: {point}; the number at its end is the last value."
    return f"Thin line: {point}. Thick line: running mean; the number at its end is its last value."
