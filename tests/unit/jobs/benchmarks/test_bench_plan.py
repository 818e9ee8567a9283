"""The benchmark `plan`: every run can be planned, none judges itself, and what goes on record."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks import plan
from jobs.benchmarks.support.mixtures import MIXTURES
from jobs.benchmarks.support.published import NOT_PLANNED, compared
from sparsify.costs.seconds import Rates
from sparsify.errors import InputError

RATES = Rates(1e11, 3e10, 1e10, 4e8, 4e8, float32=1e11, overlaps=False, disk=1e9)


@pytest.mark.parametrize("one", plan.RUNS, ids=plan.label)
def test_every_run_can_be_planned(one: dict[str, Any], tmp_path: Path) -> None:
    plan.config_of(one).save_pretrained(tmp_path)
    memory, seconds, parts = plan.planned(one, tmp_path, RATES)
    assert 1e7 < memory == pytest.approx(sum(parts.values()))
    assert 0.1 < seconds < 1000
    if one["kind"] == "distill":
        assert plan.distill_config(one).distill.zero_stage == one["distill"]["zero_stage"]


def test_runs_cover_what_was_promised() -> None:
    recoveries = [one for one in plan.RUNS if one["kind"] == "distill"]
    assert {one["distill"]["zero_stage"] for one in recoveries} == {0, 1, 2, 3}
    assert {one["workers"] for one in plan.RUNS} == {1, 2}
    assert {one["kind"] for one in plan.RUNS if one["shape"] in MIXTURES} == {"distill", "prune"}
    assert len({plan.label(one) for one in plan.RUNS}) == len(plan.RUNS) >= 8
    assert len({(one["shape"], one["layers"]) for one in plan.RUNS}) >= 3


def entry(kind: str, measured_s: float, base_s: float) -> dict[str, Any]:
    return {"label": kind, "kind": kind, "measured_s": measured_s, "base_s": base_s,
            "measured_bytes": 1e9, "planned_bytes": 1.1e9}  # fmt: skip


def test_no_run_is_corrected_by_itself() -> None:
    found = [entry("distill", 2, 1), entry("distill", 8, 1), entry("prune", 5, 1)]
    plan.with_factors(found)
    assert [one["planned_s"] for one in found] == pytest.approx([8, 2, 1])
    outcome = plan.summarise(found, {})
    assert sum(t.what.startswith(("memory", "time")) for t in outcome.targets) == 6
    assert outcome.tables[0].rows[0][3] == "1.10"
    json.dumps(outcome.figures, allow_nan=False)


def test_a_run_that_is_planned_badly_does_not_spoil_the_others() -> None:
    found = [entry("distill", seconds, 1) for seconds in (1.0, 1.1, 1.0, 9.0)]
    plan.with_factors(found)
    assert [one["planned_s"] for one in found] == pytest.approx([1.1, 1.0, 1.1, 1.0])


def test_published_figures_are_within_a_quarter_but_one() -> None:
    missed = [one.what for one in compared() if abs(one.ratio - 1) > 0.25]
    assert missed == ["NeMo, Qwen3 8B to 6B distilled, tensor parallel, H100"]
    assert len(list(compared())) >= 15
    assert all(len(one) == 3 for one in NOT_PLANNED)


def test_what_was_measured_is_kept_for_a_resume(tmp_path: Path) -> None:
    path, (one, other) = tmp_path / "figures.json", plan.RUNS[:2]

    def measured(seconds: float, resume: bool, run: dict[str, Any], what: str) -> float:
        figures = plan._Measured(path, resume).of(run, what, lambda: [{"cpu_s": seconds}])
        return figures[0]["cpu_s"]

    assert measured(1.0, False, one, "time") == measured(2.0, True, one, "time") == 1.0
    assert measured(3.0, True, one, "memory") == 3.0
    assert measured(4.0, True, other, "time") == 4.0
    assert measured(5.0, False, one, "time") == 5.0


def test_a_run_is_planned_by_the_mean_of_its_workers_rates() -> None:
    faster = asdict(replace(RATES, products=3e11))
    found = plan._rates_of([{"rates": [asdict(RATES), faster]}, {"rates": [faster, faster]}])
    assert found == replace(RATES, products=2.5e11)


def test_a_number_of_runs_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match="--runs 99: there are"):
        plan.run(Namespace(runs=99, resume=False, workdir=Path()))
