"""The summary of a run: what the records of its stages become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config
from jobs.pipeline import PIPELINE
from jobs.reporting.page import _results_table
from jobs.reporting.summary import _label, build_summary
from jobs.runs.artifact import RECORD
from jobs.runs.context import StageContext
from jobs.runs.models import Models
from sparsify.packed.layout import Scheme
from tests.conftest import stage_record
from tests.quantized import packed_with

LAYER = {
    "method": "wanda", "name": "model.layers.0.up", "block": 0, "shape": [8, 4], "num_tokens": 64,
    "error": 1.0, "relative_error": 0.1, "sparsity": 0.5, "damping": None, "num_dead_columns": 0,
}  # fmt: skip
NEW = {
    "tokens_per_column": 16.0, "condition": 12.5, "large_kept": 1.0,
    "seconds": {"statistics": 0.5, "solve": 1.5},
}  # fmt: skip


def summary_of(run_dir: Path, prune: dict[str, Any], is_earlier: bool = False) -> dict[str, Any]:
    """Of a run whose models were pruned in it, or in an earlier one."""
    model = run_dir / "model"  # no files: a model's size is not what is tested here
    metrics = {"pattern": "2:4", "method": "wanda", **prune}
    if not is_earlier:
        (run_dir / "prune").mkdir()
        record = stage_record(metrics=metrics, duration_s=3.0)
        (run_dir / "prune" / RECORD).write_text(record, encoding="utf-8")
    nothing: Any = None
    models = Models(model, PIPELINE, {"prune": {"wanda": model}}, "wanda")
    if is_earlier:
        models.metrics["prune"] = metrics
    context = StageContext(
        Config(), Config(), run_dir, "command", models, nothing, nothing, nothing
    )  # fmt: skip
    return build_summary(run_dir, context)


def test_layers_go_into_the_summary_with_all_their_figures(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, {"layers": [LAYER | NEW]})
    assert summary["schema"] == 1
    assert summary["layers"] == [LAYER | NEW]


def test_time_of_every_method_and_of_its_phases(tmp_path: Path) -> None:
    prune = {
        "layers": [], "seconds": {"magnitude": 1.0, "wanda": 2.5},
        "phases": {"wanda": {"statistics": 0.5, "solve": 1.5}},
    }  # fmt: skip
    assert summary_of(tmp_path, prune)["pruning"] == [
        {"method": "magnitude", "duration_s": 1.0, "seconds": {}},
        {"method": "wanda", "duration_s": 2.5, "seconds": {"statistics": 0.5, "solve": 1.5}},
    ]


@pytest.mark.parametrize("prune", [{"layers": [LAYER]}, {}])
def test_record_of_an_earlier_version(tmp_path: Path, prune: dict[str, Any]) -> None:
    summary = summary_of(tmp_path, prune)
    assert summary["layers"] == prune.get("layers", [])
    assert summary["pruning"] == []


def test_an_evaluation_by_itself_knows_what_was_proved_of_its_models(tmp_path: Path) -> None:
    score = {"perplexity": 2.0, "kl": 0.0, "top1_agreement": 1.0}
    (tmp_path / "evaluate").mkdir()
    record = stage_record(metrics={"results": {"dense": score, "wanda": score}})
    (tmp_path / "evaluate" / RECORD).write_text(record, encoding="utf-8")
    prune = {"gate": {"wanda": {"num_violations": 0}}, "packed_bytes": {"wanda": 7}}
    summary = summary_of(tmp_path, prune, is_earlier=True)
    dense, wanda = summary["results"]
    assert (dense["violations"], dense["packed_bytes"]) == (None, None)
    assert (wanda["violations"], wanda["packed_bytes"]) == (0, 7)
    assert [stage["name"] for stage in summary["stages"]] == ["evaluate"]


def test_zeros_count_among_all_weights(tmp_path: Path) -> None:
    score = {"perplexity": 2.0, "kl": 0.0, "top1_agreement": 1.0}
    (tmp_path / "evaluate").mkdir()
    record = stage_record(metrics={"results": {"dense": score, "wanda": score}})
    (tmp_path / "evaluate" / RECORD).write_text(record, encoding="utf-8")
    gate = {"num_violations": 0, "num_weights": 8, "num_zeros": 4}
    whole = {**gate, "num_model_weights": 80, "num_model_zeros": 6}
    dense, pruned = summary_of(tmp_path, {"gate": {"wanda": whole}})["results"]
    assert dense["zero_share"] is None and pruned["zero_share"] == 0.075
    headings, _ = _results_table([dense, pruned], "2:4")
    assert ("Zeros", "of all weights") in headings


def test_a_sparse_model_by_itself_is_not_called_dense(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = packed_with(tmp_path / "packed", tiny_model_dir, Scheme("int", 4, 32))
    nothing: Any = None

    def label(models: Models) -> str:
        context = StageContext(Config(), Config(), tmp_path, "", models, nothing, nothing, nothing)
        return _label("dense", context)

    assert label(Models(tiny_model_dir, PIPELINE)) == "dense"
    said = {
        "format": "twofour-sparsity", "version": 1, "pattern": "2:4", "method": "wanda",
        "provenance": {}, "layers": {},
    }  # fmt: skip
    (folder / "sparsity.json").write_text(json.dumps(said))
    assert label(Models(folder, PIPELINE)) == "2:4 wanda + INT4"
    assert label(Models(tiny_model_dir, PIPELINE, {"prune": {"wanda": folder}})) == "dense"
