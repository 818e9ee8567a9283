"""Benchmark tasks of a stage: what is asked, and what of earlier answers is used and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conf.options.evaluate import EvaluateConfig
from conf.schema import Config
from jobs.harness import results
from jobs.harness.plan import Plan
from jobs.pipeline import PIPELINE
from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext
from jobs.runs.folder import write_json
from jobs.runs.models import Models
from jobs.stages import evaluate, tasks
from tests.benchmarks import make_tasks


class Stopped(Exception):
    """In place of a signal."""


class Run:
    """One run's folder, whose stage evaluate is made by commands with other tasks."""

    def __init__(self, folder: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.files = folder / "run", model, make_tasks(folder / "tasks")
        self.folder.mkdir()
        self.asked: list[str] = []
        self.scored = 0
        self.stop_after = 99
        patch.setattr(tasks, "_ask", self._ask)
        patch.setattr(evaluate, "score", self._score)

    def _score(self, *_: Any) -> dict[str, Any]:
        self.scored += 1
        return {"dense": {"perplexity": 2.0}}

    def _ask(
        self, context: StageContext, plan: Plan, asked: tasks.Asked, folders: Any,
        settings: dict[str, Any], scratch: Path, stage: str,
    ) -> None:  # fmt: skip
        for (model, name), key in asked.items():
            if len(self.asked) >= self.stop_after:
                raise Stopped
            self.asked.append(name)
            metric = {"score": 0.5, "stderr": None, "higher_is_better": True, "link": "mean",
                      "values": [0.0, 1.0], "denominators": None}  # fmt: skip
            path = results.kept_path(scratch, key)
            path.parent.mkdir(exist_ok=True)
            write_json(path, {
                "key": key, "model": model, "task": name, "num_fewshot": 0, "num_documents": 2,
                "dataset": ["json", None], "doc_hashes": ["a", "b"],
                "metrics": {"acc,none": metric},
            })  # fmt: skip

    def evaluate(self, *names: str, stop_after: int = 99, **options: Any) -> list[str]:
        """Make the stage; the tasks that were asked for it."""
        self.asked, self.stop_after = [], stop_after
        redo = options.pop("redo", [])
        config = Config(evaluate=EvaluateConfig(
            tasks=[str(self.files[name]) for name in names], **options
        ))  # fmt: skip
        config.run.redo = redo
        nothing: Any = None
        context = StageContext(
            config, config, self.folder, "command", Models(self.model, PIPELINE), nothing, nothing,
            nothing,
        )  # fmt: skip
        asking = tasks.inputs(context)
        identity = {"config": {}, "inputs": {"dense": "fingerprint", **asking}}
        writer = StageWriter(self.folder, "evaluate", identity, "command", bool(redo), "keep")
        try:
            metrics = evaluate.run(context, writer)
        except Stopped:
            return self.asked
        rows = [row["name"] for row in metrics.get("tasks", {"rows": []})["rows"]]
        assert [name for name in rows if name != "mean"] == list(names)
        writer.commit(metrics, 0)
        return self.asked


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, tiny_model_dir, monkeypatch)


def test_an_interrupted_evaluation_goes_on_with_more_tasks_and_fewer(run: Run) -> None:
    assert run.evaluate("choice", "writes", stop_after=1) == ["choice"]
    assert run.evaluate("choice", "writes", "bits", stop_after=1) == ["writes"]
    assert run.evaluate("bits") == ["bits"], "fewer tasks"
    assert run.evaluate("choice", "writes", "bits") == [], "those left out were kept"
    assert run.scored == 1, "scores on text do not depend on tasks"


def test_results_of_other_options_lie_beside_each_other(run: Run) -> None:
    assert run.evaluate("choice", "bits", stop_after=1) == ["choice"]
    assert run.evaluate("choice", "bits", limit=2, stop_after=1) == ["choice"]
    assert run.evaluate("choice", "bits") == ["bits"]
    assert run.evaluate("choice", limit=2) == [], "of the interrupted one of before"
    assert run.evaluate() == [], "no tasks"
    assert run.evaluate("choice", "bits") == []


def test_other_packages_answer_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.evaluate("bits") == ["bits"]
    monkeypatch.setattr(results, "versions", lambda _: {"transformers": "6"})
    assert run.evaluate("bits") == ["bits"]


def test_a_redo_asks_again_and_is_carried_on(run: Run) -> None:
    assert run.evaluate("choice") == ["choice"]
    again = {"redo": ["evaluate"]}
    assert run.evaluate("choice", "bits", stop_after=1, **again) == ["choice"]
    assert run.evaluate("choice", "bits", "writes", **again) == ["bits", "writes"]
    assert run.scored == 2
