"""A plan, a budget and a simulation as lines of text, and the simulation's plot."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from conf.schema import PlanJobConfig
from jobs.planning.budget import make_budget
from jobs.planning.calibration import Load
from jobs.planning.run import make_plan
from jobs.planning.simulation import simulate_sizes
from jobs.reporting import svg, units

_COMPONENTS = (
    "student", "teacher", "masters", "moments", "gradients", "activations", "logits chunk",
    "buffers", "masks", "runtime",
)  # fmt: skip

_WIDTH = 80

_ODD = 3.0  # times what was planned: no rate of a machine is that far off

_NAMED = re.compile(r"(model|cluster|times)  +|         (?=\S)")

_DEVICES = ("a100-40", "a100-80", "h100", "h200", "b200", "l40s", "rtx4090", "rtx5090")


def shown(config: PlanJobConfig, load: Load) -> tuple[dict[str, Any], list[str]]:
    """What was asked for, as plain values and as lines of text.

    Args:
        config: of the run that is planned.
        load: see `planning.calibration.read_calibration`.

    Raises:
        InputError: see `make_plan`, `make_budget` and `simulate_sizes`.
    """
    if config.plan.show == "budget":
        found = make_budget(config)
        return found, budget_lines(found)
    if config.plan.show == "simulate":
        found = simulate_sizes(config)
        return found, simulation_lines(found)
    found = make_plan(config, load)
    return found, plan_lines(found)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text in columns, the first to the left and the others to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  " + "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]  # fmt: skip


def _wrapped(lines: Sequence[str]) -> list[str]:
    """Lines of prose and `name  prose` cut to a terminal's width; tables are left as they are."""
    found = []
    for line in lines:
        name = _NAMED.match(line)
        indent = " " * len(name[0]) if name else "  "
        is_table = line.startswith("  ") and name is None
        found += [line] if is_table or not line else textwrap.wrap(
            line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )  # fmt: skip
    return found


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 5e7 else f"{size / 1e9:.3f}" if size else "-"


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What `planning.run.make_plan` found."""
    model, machine = plan["model"], plan["machine"]
    lines = [
        f"model    {model['path']}: {model['class']}, {units.large_count(model['parameters'])} "
        f"parameters in {model['blocks']} blocks, {units.large_count(model['prunable'])} prunable",
        *([f"         {model['note']}"] if model["note"] else []),
        f"cluster  {machine['workers']} x {machine['name']}, {machine['workers_per_node']} to a "
        f"machine; {_gb(machine['memory_bytes'])} GB of each may be taken",
        *_calibration_lines(plan["calibration"], machine),
    ]
    if "pruning" in plan:
        lines += ["", *_pruning_lines(plan["pruning"])]
    if "recovery" in plan:
        lines += ["", *_recovery_lines(plan["recovery"])]
    for stage, use in plan["whole"].items():
        fits = "" if use["fits"] else ": does NOT fit"
        way = "models whole" if stage == "evaluate" else "block by block"
        lines.append(f"{stage}: {_gb(use['bytes'])} GB a worker, {way}{fits}")
    lines += ["", *_time_lines(plan["time"])]
    lines += ["", "disk, GB in the run's folder"]
    lines += aligned([(name, _gb(size)) for name, size in plan["disk"].items()])
    lines += ["", *_serving_lines(plan["serving"])]
    return _wrapped(lines)


def _calibration_lines(found: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    lines = []
    for stage, ratios in found["ratios"].items():
        low, high = min(ratios), max(ratios)
        span = f"{low:.2f}" if len(ratios) == 1 else f"{low:.2f} to {high:.2f}"
        lines.append(
            f"measured {stage}: {len(ratios)} run{'s' * (len(ratios) > 1)} took {span} times what "
            "was planned; this plan's times are corrected by it"
            + ("" if max(high, 1 / low) < _ODD else
               ": so far off that the run was too short, or its machine too busy, to say much")
        )  # fmt: skip
    lines += [f"left out {words}" for words in found["left_out"]]
    if not found["ratios"]:
        lines.append(
            "times    come from data sheets and published runs, none of this machine's: "
            "plan.records=[RUN] corrects them"
            if machine["is_gpu"] else
            f"times    come from what a thread of this machine did just now "
            f"({machine['products'] / 1e9:.0f} Gflop/s of float32 products): plan.records=[RUN] "
            "corrects them"
        )  # fmt: skip
    return lines


def _pruning_lines(found: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name for use in found.values() for name in use["parts"]))
    rows = [["pruning, GB a worker", *found]]
    rows += [[name, *(_gb(use["parts"].get(name, 0)) for use in found.values())] for name in names]
    rows.append(["in all", *(_gb(use["bytes"]) for use in found.values())])
    rows.append(["hidden states wait on", *(use["activations"] for use in found.values())])
    rows.append(["fits", *("yes" if use["fits"] else "NO" for use in found.values())])
    return [line[2:] if at == 0 else line for at, line in enumerate(aligned(rows))]


def _recovery_lines(found: dict[str, Any]) -> list[str]:
    uses = {"as asked": found["asked"]}
    uses |= {f"ZeRO {stage}": use for stage, use in found["by_stage"].items()}
    if found["best"] is not None:
        uses["cheapest"] = found["best"]
    rows = [["recovery, GB a worker", *uses]]
    rows += [
        [name, *(_gb(use["parts"].get(name, 0.0)) for use in uses.values())] for name in _COMPONENTS
    ]
    rows.append(["in all", *(_gb(use["bytes"]) for use in uses.values())])
    rows.append(["in host memory", *(_gb(use["host_bytes"]) for use in uses.values())])
    rows.append(["fits", *("yes" if use["fits"] else "NO" for use in uses.values())])
    lines = [line[2:] if at == 0 else line for at, line in enumerate(aligned(rows))]
    lines += [f"fullest at the {found['asked']['moment']}", *_grid_lines(found["grid"])]
    best = found["best"]
    if best is None:
        lines.append("nothing fits: use more or larger GPUs")
    elif best["overrides"]:
        lines.append(f"cheapest that fits: {' '.join(best['overrides'])}")
    else:
        lines.append("cheapest that fits: as it was asked for")
    step = found["step"]
    told = f" with {' '.join(found['planned'])}" if found["planned"] else ""
    lines += [
        f"a step{told}: {units.duration(step['step_s'])}, "
        f"{step['tokens_per_s_per_gpu']:,.0f} tokens/s a worker, {step['num_steps']:,} steps of "
        f"{step['tokens']:,} tokens",
        "its time: " + ", ".join(
            f"{name} {seconds / step['step_s']:.0%}"
            for name, seconds in sorted(step["parts_s"].items(), key=lambda item: -item[1])
            if seconds >= 0.005 * step["step_s"]
        ),
        f"network: {_gb(step['sent_bytes'])} GB a worker and step, "
        f"{step['sent_rate'] / 1e9:.2f} GB/s over links"
        + (f", {step['network_rate'] / 1e9:.2f} GB/s a worker between machines"
           if step["network_rate"] else ""),
        f"checkpoint: {_gb(step['checkpoint_bytes'])} GB, stalls {step['stall_s']:.1f} s; by Young "
        f"every {step['checkpoint_every_steps']:,} steps "
        f"({units.duration(step['checkpoint_every_s'])}) for a failure in "
        f"{step['mtbf_hours']:g} hours",
    ]  # fmt: skip
    return lines


def _grid_lines(grid: list[dict[str, Any]]) -> list[str]:
    columns = dict.fromkeys((cell["recompute"], cell["recompute_share"]) for cell in grid)
    names = [f"{share:g} " if kind == "whole" else "elem. " for kind, share in columns]
    rows = [["ZeRO, teacher", *names]]
    by_row: dict[tuple[int, str], list[str]] = {}
    for cell in grid:
        mark = " " if cell["fits"] else "*"
        key = (cell["zero_stage"], cell["teacher_placement"])
        size = cell["bytes"] / 1e9
        text = f"{size:.{1 if size < 100 else 0}f}/{units.significant(cell['step_s'])}{mark}"
        by_row.setdefault(key, []).append(text)
    rows += [[f"{stage}, {place}", *cells] for (stage, place), cells in by_row.items()]
    return [
        "",
        "GB a worker / seconds of a step by share of recomputed blocks; * does not fit",
        "elem.: of all blocks, what lies between products of matrices",
        *aligned(rows),
    ]


def _time_lines(found: dict[str, Any]) -> list[str]:
    rows = [(name, units.duration(seconds)) for name, seconds in found["stages_s"].items()]
    rows.append(("in all", units.duration(found["all_s"])))
    lines = ["time", *aligned(rows), f"  {found['gpu_hours']:,.1f} GPU-hours"]
    if found["money"] is not None:
        lines[-1] += f", {found['money']:,.2f} at the price given"
    return lines


def _serving_lines(found: dict[str, Any]) -> list[str]:
    rows = [["served as", "GB", *_DEVICES]]
    for row in found["rows"]:
        kind = f"{row['format']}, {'packed' if row['is_packed'] else 'dense'}"
        cells = [
            "-" if key not in row["cards"] else "/".join(map(str, row["cards"][key]))
            for key in _DEVICES
        ]
        rows.append([kind, _gb(row["bytes"]), *cells])
    large = found["llama-2-70b"]
    lines = [
        f"serving: cards needed for one request / for all of plan.batch_size; keys and values take "
        f"{units.size(found['kv_bytes_per_1k'])} per 1,000 tokens",
        *aligned(rows),
        "  2:4 packed: as transformers and vLLM hold it with this project's plugin",
        "",
        "Llama-2-70B, for comparison; of all that a card has",
    ]
    rows = [["use", "GB", *large["cards"]]]
    for label, size in (
        ("8 bit, one request", large["int8"] + large["kv_bytes"] + 1e9),
        ("4 bit, one request", large["int4"] + large["kv_bytes"] + 1e9),
        ("QLoRA, rank 4, 1,024 tokens", large["qlora"]),
    ):
        needed = [math.ceil(size / memory) for memory in large["cards"].values()]
        rows.append([label, _gb(size), *(f"{count} card{'s' * (count > 1)}" for count in needed)])
    return [*lines, *aligned(rows)]


def budget_lines(found: dict[str, Any]) -> list[str]:
    """What `planning.budget.make_budget` found."""
    price = found["price"]
    unit = "GPU-hours" if price is None else "money"
    times = 1.0 if price is None else price
    rows = [["way", "size", "tokens", "training", "serving", "in all"]]
    for way in found["ways"]:
        rows.append([
            way["label"], units.large_count(found["parameters"]),
            units.large_count(found["trained_tokens"]),
            *(f"{times * way[key]:,.0f}" for key in _COSTS),
        ])  # fmt: skip
    for way in found["small"]:
        rows.append([
            way["label"], units.large_count(way["parameters"]), units.large_count(way["tokens"]),
            *(f"{times * way[key]:,.0f}" for key in _COSTS),
        ])  # fmt: skip
    rivals = [w for w in found["ways"] if w["gap"] > 0]
    best = min(rivals, key=lambda way: way["total_hours"])
    totals = [way["total_hours"] for way in found["small"] if "int4" in way["label"]]
    low, high = min(totals), max(totals)
    verdict = "cheaper" if best["total_hours"] < low else (
        "dearer" if best["total_hours"] > high else "cheaper by one law and dearer by the other"
    )  # fmt: skip
    return _wrapped([
        f"{found['model']} on {found['machine']}: {units.large_count(found['served_tokens'])} "
        f"tokens served over its life, {unit}",
        *([found["note"]] if found["note"] else []),
        *aligned(rows),
        f"{best['label']} is {verdict} than a dense model of the same loss in int4 "
        f"({times * low:,.0f} to {times * high:,.0f} by the two laws)",
        "counted: 6 N D operations of a training at 45 % of the peak, a token served by the "
        "roofline (weights read once for plan.batch_size requests); not counted: the training of "
        "the model that is pruned",
        f"the recovered model is taken to be {found['loss_gap']:g} nats worse than the dense one "
        "(plan.loss_gap: measure yours), the dense small one to follow Hoffmann et al. 2022 or "
        "Besiroglu et al. 2024; they differ by what you see, and other data by more",
        *(["2:4 is served as if dense (plan.sparse_speedup=1): it then saves nothing"]
          if found["sparse_speedup"] == 1 else []),
    ])  # fmt: skip


_COSTS = ("training_hours", "serving_hours", "total_hours")


def simulation_lines(found: dict[str, Any]) -> list[str]:
    """What `planning.simulation.simulate_sizes` found."""
    rows = [[
        "GPUs", "rows", "step", "fails", "goodput", "10 %", "half", "90 %",
        "GPU h", "save", "best",
    ]]  # fmt: skip
    for row in found["rows"]:
        finish = [f"{row['finish_s'][share] / 3600:.1f}" for share in ("0.1", "0.5", "0.9")]
        rows.append([
            str(row["gpus"]), str(row["rows"]), f"{row['step_s']:.2f}",
            f"{row['failures'] + row['preemptions']:.2f}",
            f"{row['goodput']:.1%}", *finish, f"{row['gpu_hours']:,.0f}",
            f"{row['young_steps']:,}", f"{row['best_steps']:,}",
        ])  # fmt: skip
    return _wrapped([
        f"{found['model']} on {found['machine']}: {units.large_count(found['tokens'])} tokens, "
        f"{found['runs']} runs on paper for each size",
        *([found["note"]] if found["note"] else []),
        *aligned(rows),
        "step: in seconds; fails: with preemptions, in a run; 10 %, half, 90 %: hours until so "
        "many of the runs are done; save: steps between "
        "checkpoints by Young's formula for failures alone; best: those of the least time of seven "
        "intervals around it, on runs long enough to fail ten times",
        *(f"left out {words}" for words in found["left_out"]),
    ])  # fmt: skip


_STYLE = Markup(
    "text{font:12px sans-serif;fill:#333}.end{text-anchor:end}.middle{text-anchor:middle}"
    ".plot{overflow:visible}.grid{stroke:#ddd}.line{fill:none;stroke:#1769aa;stroke-width:2;"
    "vector-effect:non-scaling-stroke}.band{fill:#1769aa;opacity:.2}"
)


def simulation_plot(found: dict[str, Any]) -> str:
    """Finish against the number of GPUs: the middle run, and from the fastest to the slowest tenth;
    a drawing that stands alone."""
    rows, height = found["rows"], 320
    across = svg.Scale.over([float(row["gpus"]) for row in rows], is_log=True, pad=0.02)
    hours = [[row["finish_s"][s] / 3600 for s in ("0.1", "0.5", "0.9")] for row in rows]
    up = svg.Scale.over([hour for three in hours for hour in three], is_log=True, pad=0.05)
    xs = [across(row["gpus"]) for row in rows]
    curves = [
        *svg.areas(xs, [(up(low), up(high)) for low, _, high in hours], "band", 0.01),
        *svg.polylines(xs, [up(middle) for _, middle, _ in hours], "line", 0.01),
    ]
    labels = [(across(row["gpus"]), str(row["gpus"])) for row in rows]
    drawing = svg.plot(
        "Hours until the run is finished, by number of GPUs", height, up, curves,
        axis=svg.axis_below(labels, "GPUs (hours until finished, tenth to nine tenths)", height),
    )  # fmt: skip
    style = svg.element("style", _STYLE)
    inside = svg.element("g", style, drawing)
    # The drawing hangs its scale's labels left of itself.
    outer = svg.element(
        "svg", svg.element("svg", inside, x="60", y="16", width="560", height=height + 60,
                           overflow="visible"),
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 680 {height + 80}", width="680",
    )  # fmt: skip
    return f"{outer}\n"
