"""The benchmark `plan`: every run can be planned, none judges itself, and what goes on record."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks import plan
from jobs.benchmarks.support.published import NOT_PLANNED, compared
from jobs.benchmarks.support.random_llama import llama_config
from sparsify.errors import InputError


@pytest.mark.parametrize("one", plan.RUNS, ids=plan.label)
def test_every_run_can_be_planned(one: dict[str, Any], tmp_path: Path) -> None:
    llama_config(one["shape"], one["layers"], 1024, one["vocabulary"]).save_pretrained(tmp_path)
    memory, seconds, parts = plan.planned(one, tmp_path)
    assert 1e7 < memory == pytest.approx(sum(parts.values()))
    assert 0.1 < seconds < 1000
    if one["kind"] == "distill":
        assert plan.distill_config(one).distill.zero_stage == one["distill"]["zero_stage"]


def test_runs_cover_what_was_promised() -> None:
    recoveries = [one for one in plan.RUNS if one["kind"] == "distill"]
    assert {one["distill"]["zero_stage"] for one in recoveries} == {0, 1, 2, 3}
    assert {one["workers"] for one in plan.RUNS} == {1, 2}
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


def test_published_figures_are_within_a_quarter_but_one() -> None:
    missed = [one.what for one in compared() if abs(one.ratio - 1) > 0.25]
    assert missed == ["NeMo, Qwen3 8B to 6B distilled, tensor parallel, H100"]
    assert len(list(compared())) >= 15
    assert all(len(one) == 3 for one in NOT_PLANNED)


def test_what_was_measured_is_kept_for_a_resume(tmp_path: Path) -> None:
    path, one = tmp_path / "measured.json", plan.RUNS[0]
    plan._Measured(path, False).keep(one, [{"cpu_s": 1.0}])
    assert plan._Measured(path, True).get(one) == [{"cpu_s": 1.0}]
    assert plan._Measured(path, False).get(one) is None
    assert plan._Measured(path, True).get(plan.RUNS[1]) is None


def test_a_number_of_runs_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match="--runs 99: there are"):
        plan.run(Namespace(runs=99, resume=False, workdir=Path()))
