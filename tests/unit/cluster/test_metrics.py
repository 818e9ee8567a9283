"""Metrics of a run: their values from what workers say, and the Grafana dashboard that asks for
them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.metrics import METRICS, RAY_PREFIX, Values
from cluster.runtime import worker
from cluster.spec import ClusterSpec

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = ROOT / "cluster" / "grafana" / "twofour.json"


def shown(values: Values) -> dict[str, dict[tuple[str, ...], float]]:
    """Name -> values by the labels after `run`."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for metric, labels, value in values.samples():
        assert labels.pop("run") == "mine"
        assert list(labels) == ["stage", *metric.labels]
        found.setdefault(metric.name.removeprefix("twofour_"), {})[tuple(labels.values())] = value
    return found


def progress(stage: str, done: float, total: float, text: str) -> dict[str, Any]:
    return {"kind": "progress", "name": stage, "done": done, "total": total, "text": text}


def figures(stage: str, step: int | None, **values: Any) -> dict[str, Any]:
    named = {f"{stage}/{key}": value for key, value in values.items()}
    return {"kind": "metrics", "name": stage, "values": named, "step": step}


def test_figures_of_a_step_become_gauges_in_base_units() -> None:
    values = Values("mine")
    values.take(figures("distill", 3, kl=0.5, tflops_per_s=2.0, mfu=0.4, is_skipped=False, x=1.0))
    assert shown(values) == {
        "kl_nats": {("distill",): 0.5}, "flops_per_second": {("distill",): 2e12},
        "mfu_ratio": {("distill",): 0.4}, "step": {("distill",): 3.0},
    }  # fmt: skip


def test_what_is_no_number_now_is_not_shown_as_it_was() -> None:
    values = Values("mine")
    values.take(figures("distill", 1, loss=1.0))
    values.take(figures("distill", 2, loss=math.nan, kl=math.inf))
    assert shown(values) == {"step": {("distill",): 2.0}}


def test_held_out_text_by_source() -> None:
    values = Values("mine")
    scores = {"heldout_ce/code": math.log(7), "heldout_kl/code": 0.1, "heldout_ce/x/y": 1e9}
    values.take(figures("distill", 10, **scores))
    found = shown(values)
    assert found["heldout_perplexity"] == {("distill", "code"): pytest.approx(7.0)}
    assert found["heldout_kl_nats"] == {("distill", "code"): 0.1}


def test_progress_by_unit_only_grows_and_outlives_its_stage() -> None:
    values = Values("mine")
    values.take(progress("distill", 1, 1, "sources tokenised"))
    values.take(progress("distill", 1, 4, "steps, loss 1.0"))
    values.take(figures("distill", 1, loss=1.0))
    values.take({"kind": "memory", "name": "distill", "rank": 1, "peak_bytes": 2**30})
    assert shown(values)["worker_peak_memory_bytes"] == {("distill", "1"): 2.0**30}
    values.take(progress("distill", 4, 4, "steps, loss 0.9"))
    values.end("distill")
    values.take(progress("export", 0, 0, "exports"))
    assert shown(values) == {
        "stage_progress_ratio": {
            ("distill", "sources tokenised"): 1.0, ("distill", "steps"): 1.0,
            ("export", "exports"): 1.0,
        },
        "stage_units_done": {
            ("distill", "sources tokenised"): 1.0, ("distill", "steps"): 4.0,
            ("export", "exports"): 0.0,
        },
        "stage_units": {
            ("distill", "sources tokenised"): 1.0, ("distill", "steps"): 4.0,
            ("export", "exports"): 0.0,
        },
    }  # fmt: skip


def test_other_stages_keep_their_figures_and_other_events_say_nothing() -> None:
    values = Values("mine")
    values.take(figures("distill", 1, loss=1.0))
    values.take(figures("prune", None, **{"twofour/error": 1.0}))
    values.take({"kind": "warning", "text": "no stage"})
    values.take({"kind": "info", "name": "prune", "text": "a line"})
    values.end("prune")
    assert set(shown(values)) == {"loss", "step"}


def test_series_are_bounded_however_long_a_run_is() -> None:
    values = Values("mine")
    for step in range(1, 2001):
        values.take(figures("distill", step, loss=1 / step, kl=0.1))
        values.take(progress("distill", step, 2000, f"steps, loss {1 / step:.4f}"))
    assert len(values.samples()) == 6


def test_workers_post_no_more_for_it_than_their_memory_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted: 1,000 steps of 50 ms on two workers."""

    class Line:
        posted: list[dict[str, Any]]

        def post(self, event: dict[str, Any], label: str = "", wait: bool = False) -> None:
            assert not wait
            self.posted.append(event)

    now_s = 1000.0
    monkeypatch.setattr(worker.time, "monotonic", lambda: now_s)
    reads = []
    monkeypatch.setattr(worker, "peak_memory_bytes", lambda: reads.append(1) or 7)
    lines = []
    for rank in (0, 1):
        lines.append(line := Line())
        line.posted, now_s = [], 1000.0
        context = worker.WorkerContext(line, "distill", rank, 2, ClusterSpec())  # type: ignore[arg-type]
        for step in range(1, 1001):
            now_s += 0.05
            context.progress(step, 1001, "steps")
            context.metrics({"distill/loss": 1.0}, step)
    kinds = [[event["kind"] for event in line.posted] for line in lines]
    assert kinds[1] == ["memory"] * 5
    assert [kinds[0].count(kind) for kind in ("memory", "metrics")] == [5, 1000]
    assert len(reads) == 10
    assert lines[1].posted[0] == {
        "kind": "memory", "name": "distill", "rank": 1, "peak_bytes": 7,
    }  # fmt: skip


def test_names_are_as_prometheus_wants_them_and_told_apart() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"twofour_[a-z]+(_[a-z]+)*", metric.name)
        assert not metric.name.endswith("_total"), "a gauge is no counter"
        assert metric.text
        assert len(metric.labels) <= 1, "Values keeps one label of its own"


# --- the dashboard

PANELS: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def test_dashboard_asks_for_metrics_that_exist_and_for_all_of_them() -> None:
    asked = " ".join(text for panel in PANELS for text in expressions(panel))
    known = {RAY_PREFIX + metric.name: metric for metric in METRICS}
    assert set(re.findall(r"\w*twofour_\w+", asked)) == set(known)
    for panel in PANELS:
        for text in expressions(panel):
            wanted = set(re.findall(r"by \(([^)]*)\)", text)[0].split(", "))
            for name in re.findall(r"ray_twofour_\w+", text):
                assert wanted <= {"run", "stage", *known[name].labels}, text
            for target in panel["targets"]:
                used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                assert used <= wanted, f"{panel['title']}: the legend has {used}"


def test_dashboard_is_one_that_grafana_loads() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert {"title", "uid", "schemaVersion", "templating", "panels", "time"} <= set(board)
    assert "id" not in board, "the number is Grafana's to give"
    assert len(board["uid"]) <= 40
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert "ray_twofour_stage_progress_ratio, run" in variables["run"]["query"]["query"]
    numbers = [panel["id"] for panel in PANELS]
    assert len(set(numbers)) == len(numbers)
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat", "bargauge")
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for text in expressions(panel):
            assert '{run=~"$run"}' in text


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
