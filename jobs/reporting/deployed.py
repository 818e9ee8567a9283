"""What a run's models write and how fast they answer, as plain values for the page.

Only values and words; the template turns them into HTML.
"""

from __future__ import annotations

from typing import Any

from jobs.reporting import units
from jobs.reporting.bars import Bar, BarChart, Span
from jobs.reporting.results import Row, is_recovered, label_of

SMALL_BYTES = 200e6
"""of dense weights: below it calls take longer than reading the weights does"""

_SMALL_PARAMETERS = 100e6

_FOLDERS = {"sparse-packed": "2:4 packed", "int4-packed": "2:4 INT4", "int8-packed": "2:4 INT8"}

_MANNER = ("num_tokens", "temperature", "seed")


def writing_of(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The texts of the dense model, the main method's and what came of it; None without any.

    Returns:
        `manner`: how they were written, a sentence; `texts`: label, prompt, text and, where they
        were not written alike, its own manner; `remark` on a small model, or ''.
    """
    run = summary.get("run") or {}
    rows = [row for row in summary.get("results") or [] if row.get("writing")]
    main = [
        row for row in rows
        if row["name"] in ("dense", run.get("method")) or is_recovered(row["name"])
        or "_int" in row["name"]
    ]  # fmt: skip
    if not main:
        return None
    manners = [_manner(row["writing"]) for row in main]
    is_alike = len(set(manners)) == 1
    texts = [
        {
            "label": label_of(row), "prompt": row["writing"]["prompt"],
            "text": row["writing"]["text"], "manner": "" if is_alike else manner,
        }
        for row, manner in zip(main, manners, strict=True)
    ]  # fmt: skip
    remark, num_parameters = "", run.get("num_parameters")
    if units.is_drawable(num_parameters) and num_parameters < _SMALL_PARAMETERS:
        remark = (
            f"The model has {units.large_count(num_parameters)} parameters: what it writes has the "
            "form of its text and no meaning, before pruning too."
        )
    return {"manner": manners[0] if is_alike else "", "texts": texts, "remark": remark}


def _manner(writing: dict[str, Any]) -> str:
    num_tokens, temperature, seed = (writing.get(key) for key in _MANNER)
    how = "the likeliest token each time"
    if temperature:
        how = f"sampled at temperature {temperature:g} with seed {seed}"
    return f"{how}, at most {units.count(num_tokens)} tokens"


def name_of_timed(name: str) -> str:
    """What people call a folder of the export that was timed."""
    return _FOLDERS.get(name, name)


def where_of(speed: dict[str, Any]) -> str:
    """On what it was measured: '1 thread', or the name of a GPU."""
    if speed.get("device") not in (None, "cpu"):
        return str(speed["device"])
    threads = speed.get("num_threads")
    return f"{units.count(threads)} {'thread' if threads == 1 else 'threads'}"


def conditions(speed: dict[str, Any]) -> str:
    """With what the models were measured: '1 thread, float32'."""
    return f"{where_of(speed)}, {speed.get('dtype')}"


def generation_rows(speed: dict[str, Any]) -> list[Row]:
    """Each timed model: name, num_bytes, first_token_s, tokens_per_s, times_dense."""
    rows = []
    dense_s = _positive(next((m for m in speed["models"] if m["name"] == "dense"), {}), "token_s")
    for model in speed["models"]:
        seconds = _positive(model, "token_s")
        rows.append({
            "name": name_of_timed(model["name"]), "num_bytes": model["num_bytes"],
            "first_token_s": model["first_token_s"],
            "tokens_per_s": 1 / seconds if seconds else None,
            "times_dense": dense_s / seconds if dense_s and seconds else None,
        })  # fmt: skip
    return rows


def layer_rows(layer: dict[str, Any]) -> list[Row]:
    """Each side of the large layer: name, num_bytes, median_s, times_dense (the faster dense)."""
    dense = [_positive(side, "median_s") for side in layer["sides"] if _is_dense(side)]
    dense_s = min((seconds for seconds in dense if seconds), default=None)
    return [
        {**side, "times_dense": dense_s / seconds if dense_s and seconds else None}
        for side in layer["sides"]
        for seconds in (_positive(side, "median_s"),)
    ]


def _positive(row: Row, key: str) -> float | None:
    """A figure that can be divided by; None where it was not measured."""
    value = row.get(key)
    return value if units.is_drawable(value) and value > 0 else None


def _is_dense(row: Row) -> bool:
    return str(row["name"]).startswith("dense")


def speed_of(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The charts of the speed, with what has to be said of them; None where none was measured."""
    speed = summary.get("speed") or None
    if speed is None:
        return None
    models, layer = generation_rows(speed), speed.get("layer")
    dense_bytes = next((row["num_bytes"] for row in models if _is_dense(row)), None)
    bars = _bars(
        models, "tokens_per_s",
        [f"{units.significant(row['tokens_per_s'])} tokens/s" for row in models],
        [f"first token after {units.milliseconds(row['first_token_s'])}" for row in models],
    )  # fmt: skip
    return {
        "conditions": conditions(speed),
        "models": bars,
        "is_small": units.is_drawable(dense_bytes) and dense_bytes < SMALL_BYTES,
        "num_bytes": units.size(dense_bytes),
        "layer": _layer_chart(layer) if layer else None,
        "layer_shape": f"{units.count(layer['rows'])} × {units.count(layer['columns'])}"
        if layer else "",
    }  # fmt: skip


def _layer_chart(layer: dict[str, Any]) -> BarChart:
    rows = layer_rows(layer)
    times = [units.milliseconds(row["median_s"]) for row in rows]
    return _bars(rows, "times_dense", times, [f"{time} a token" for time in times])


def _bars(rows: list[Row], key: str, values: list[str], details: list[str]) -> BarChart:
    """A bar of each row's `key` against the largest; its value and its detail in words."""
    most = max([_positive(row, key) or 0.0 for row in rows], default=0.0) or 1.0
    bars = []
    for row, value, detail in zip(rows, values, details, strict=True):
        tone = "disk" if _is_dense(row) else "packed"
        spans = [Span(tone, 0.0, (_positive(row, key) or 0) / most)]
        title = f"{row['name']}: {detail}, {units.size(row['num_bytes'])} of weights"
        note = f"{units.ratio(row['times_dense'])} dense"
        bars.append(Bar(str(row["name"]), value, note, title, [spans], None, not _is_dense(row)))
    return BarChart(bars)
