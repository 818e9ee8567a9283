"""Which models there are: what stages made, what later ones start from, what is forgotten."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.options.model import ModelConfig
from conf.options.prune import PruneConfig
from conf.options.run import STAGES, RunConfig
from conf.schema import Config
from jobs import pipeline
from jobs.pipeline import PIPELINE
from jobs.runs.artifact import RECORD
from jobs.runs.models import Models, find_models
from jobs.runs.stage import Stage
from sparsify.errors import InputError
from tests.conftest import message, stage_record

METHODS = ["magnitude", "twofour"]


def finish(run: Path, stage: str, dense: Path, **metrics: Any) -> None:
    """A finished stage's record, and what its model folder says of the dense model."""
    (run / stage).mkdir(parents=True)
    (run / stage / RECORD).write_text(stage_record(metrics=metrics))
    made = next(one for one in PIPELINE if one.name == stage).makes
    for folder in () if made is None else made(metrics).values():
        (run / stage / folder).mkdir()
        sparsity = {"pattern": "2:4", "provenance": {"dense_path": str(dense)}}
        (run / stage / folder / "sparsity.json").write_text(json.dumps(sparsity))


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """The folder of a finished run."""
    finish(tmp_path / "run", "prune", tiny_model_dir, method="twofour", methods=METHODS)
    for stage in ("distill", "evaluate", "quantize", "export"):
        finish(tmp_path / "run", stage, tiny_model_dir)
    return tmp_path / "run"


def of(run: Path, *stages: str, **options: Any) -> Models:
    config = Config(stages=list(stages), run=RunConfig(from_=str(run)), **options)
    return find_models(config, run.parent / "new", PIPELINE)


def test_the_pipeline_has_every_stage_in_order() -> None:
    assert [stage.name for stage in PIPELINE] == list(STAGES)


def test_a_stage_starts_from_the_last_sparse_model_before_it(run: Path) -> None:
    models = of(run, "quantize")
    assert models.sparse("distill") == run / "prune/twofour"
    assert models.sparse("quantize") == run / "distill/model"
    assert models.latest("export") == ("recovered", run / "distill/model"), "not the packed one"
    assert models.method == "twofour"
    assert list(models.all_sparse()) == [*METHODS, "recovered"]
    assert models.made["quantize"] == {"packed": run / "quantize/packed"}


def test_what_is_only_evaluated_may_be_the_models_path(run: Path, tiny_model_dir: Path) -> None:
    def given(**options: Any) -> Models:
        config = Config(stages=["evaluate"], model=ModelConfig(**options))
        return find_models(config, run.parent / "new", PIPELINE)

    alone = given(path=str(tiny_model_dir))
    assert (alone.dense, alone.made) == (tiny_model_dir, {})
    pair = given(path=str(tiny_model_dir), teacher=str(tiny_model_dir))
    assert pair.made == {"prune": {"given": tiny_model_dir}}
    with pytest.raises(InputError, match=r"^model\.path=.*: neither a run"):
        given(path=str(run.parent))
    with pytest.raises(InputError, match=r"run\.from: is required"):
        Config(stages=["export"], model=ModelConfig(path=str(tiny_model_dir)))


def test_a_stage_folder_is_a_run_up_to_it(run: Path, tiny_model_dir: Path) -> None:
    models = of(run / "prune", "export")
    assert models.made == {"prune": {name: run / "prune" / name for name in METHODS}}
    assert models.sparse("export") == run / "prune/twofour"
    assert models.dense == tiny_model_dir


def test_what_was_made_from_an_earlier_result_is_forgotten(run: Path) -> None:
    for stage, left in (
        ("prune", {"prune"}), ("distill", {"prune", "distill"}),
        ("quantize", {"prune", "distill", "quantize"}),
        ("evaluate", {"prune", "distill", "quantize"}),
    ):  # fmt: skip
        models = of(run, "quantize")
        models.forget_descendants(stage)
        assert set(models.made) == set(models.metrics) == left, stage


def test_a_stage_that_is_new_needs_nothing_but_itself(run: Path) -> None:
    """A stage between recovery and evaluation: what it makes is what quantising starts from."""
    nothing: Any = None
    tune = Stage("tune", "", nothing, nothing, makes=lambda _: {"tuned": "model"})
    models = replace(of(run, "quantize"), stages=[*PIPELINE[:4], tune, *PIPELINE[4:]])
    (run / "tune").mkdir()
    (run / "tune" / RECORD).write_text(stage_record())
    models.forget_descendants("tune")
    models.add("tune", run / "tune")
    assert models.sparse("distill") == run / "prune/twofour"
    assert models.latest("quantize") == ("tuned", run / "tune/model")
    assert list(models.all_sparse()) == [*METHODS, "recovered", "tuned"]
    assert "quantize" not in models.made


def test_a_damaged_stage_is_offered_for_redo_and_not_looked_at_then(
    run: Path, tiny_model_dir: Path
) -> None:
    """Of the run itself, whose folder the command continues."""
    path = run / "prune" / RECORD
    told = json.loads(path.read_text())
    lost = {**told, "outputs": {"twofour/model.safetensors": {"bytes": 9, "sha256": ""}}}
    config = Config(model=ModelConfig(path=str(tiny_model_dir)))
    for content in (json.dumps(lost), path.read_text()[:30], "{}"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"add run\.redo=\[prune\]") as error:
            find_models(config, run, PIPELINE)
        assert str(run / "prune") in message(error)
        with pytest.raises(InputError, match=r"add run\.redo=\[prune\]"):
            of(run, "quantize")
        models = find_models(config, run, PIPELINE, again={"prune"})
        assert "prune" not in models.made
        assert models.sparse("quantize") == run / "distill/model"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"pattern": "2:4"}', '{"pattern": 1}'])
def test_what_describes_a_sparse_model_and_is_damaged_is_one_line(run: Path, content: str) -> None:
    (run / "distill/model/sparsity.json").write_text(content)
    for source in (run, run / "distill"):
        with pytest.raises(InputError) as error:
            of(source, "quantize")
        assert "sparsity.json" in message(error)


def test_without_a_sparse_model_the_message_says_what_to_do(tiny_model_dir: Path) -> None:
    with pytest.raises(InputError) as error:
        Models(tiny_model_dir, PIPELINE).sparse("export")
    assert message(error).startswith("stages: export needs a pruned model and there is none")


def test_a_stage_that_refuses_does_so_before_anything_is_started(tmp_path, monkeypatch) -> None:
    def started(*_: object, **__: object) -> None:
        pytest.fail("the tracker, and with it a run on its server, was started")

    monkeypatch.setattr(pipeline, "open_tracker", started)
    config = Config(stages=["prune"], run=RunConfig(dir=str(tmp_path)))
    config = replace(config, prune=PruneConfig(pattern="3:5", block_size=125))
    with pytest.raises(
        InputError, match=r"q_proj: 128 input columns cannot be cut into groups of 5"
    ):
        pipeline.run_pipeline(config, "prune")


@pytest.mark.parametrize(
    "module",
    ["jobs.pipeline", "jobs.forecast", "jobs.teach", "jobs.pretrain", "jobs.runs.session",
     *(f"jobs.stages.{name}" for name in STAGES)],
)  # fmt: skip
def test_what_runs_on_the_driver_imports_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "ray", "rich", "hydra", "jinja2", "wandb")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_is_dropped_stands_before_what_it_was_made_from(
    run: Path, tiny_model_dir: Path
) -> None:
    """Layers dropped of a recovered model: later stages build on the smaller one alone."""
    assert of(run, "evaluate").to_drop == run / "distill/model"
    finish(run.parent / "new", "drop", tiny_model_dir, method="dropped")
    models = of(run, "evaluate")
    assert models.to_drop == run / "distill/model", "the same when the command comes again"
    assert models.made == {"drop": {"dropped": run.parent / "new/drop/model"}}
    for stage in ("prune", "distill", "evaluate"):
        assert models.sparse(stage) == run.parent / "new/drop/model"
    assert (models.dense, models.to_prune) == (tiny_model_dir, run.parent / "new/drop/model")
    config = Config(stages=["prune"])
    alone = find_models(config, run.parent / "none", PIPELINE)
    assert alone.to_drop == alone.to_prune == alone.dense
