"""Benchmark tasks through the command: killed, resumed, and every figure where a person looks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from sparsify.models.load import load_pair
from sparsify.models.masked import apply_masks_, infer_masks
from sparsify.models.save import save_model
from sparsify.pattern import Pattern
from tests.benchmarks import make_tasks
from tests.conftest import REPOSITORY
from tests.integration.commands import Command, wait_until


def test_a_killed_evaluation_asks_nothing_twice_with_another_task_either(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_pair(tiny_model_dir)
    apply_masks_(model, infer_masks(model, Pattern.parse("2:4"), may_be_dense=True))
    save_model(model, tokenizer, tmp_path / "sparse")
    files = make_tasks(tmp_path / "tasks", 40)
    words = [
        f"run.from={tmp_path / 'sparse'}", f"model.teacher={tiny_model_dir}",
        f"run.dir={tmp_path / 'run'}", f"data.calibration={text_file}", "data.sequence_length=64",
        "evaluate.num_tokens=512", "evaluate.num_new_tokens=0", "tracker.wandb=off",
        "cluster.executor=plain", "cluster.num_workers=1",
    ]  # fmt: skip

    def asking(*names: str) -> str:
        return f"evaluate.tasks=[{','.join(str(files[name]) for name in names)}]"

    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
        "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    first = Command(
        "evaluate", *words, asking("choice", "writes"), environment=environment, folder=tmp_path
    )
    answered = tmp_path / "run/.evaluate.partial/scratch/kept"
    wait_until(lambda: list(answered.glob("*.json")), first)
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    kept = set()
    for path in answered.glob("*.json"):  # a mark that only an answer of before the kill can have
        record = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**record, "num_documents_in_all": 777}), encoding="utf-8")
        kept.add((record["model"], record["task"]))
    again = Command(
        "evaluate", *words, asking("choice", "writes", "bits"), environment=environment,
        folder=tmp_path,
    ).finished(900)  # fmt: skip
    assert again.returncode == 0, again.stderr
    results = tmp_path / "run/evaluate/tasks"
    records = [json.loads(path.read_text("utf-8")) for path in results.glob("*/*.json")]
    marked = {(one["model"], one["task"]) for one in records if one["num_documents_in_all"] == 777}
    assert marked == kept
    assert len(list(results.glob("*/*.json"))) == 2 * len(files)
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    rows = summary["tasks"]["rows"]
    assert [row["name"] for row in rows] == ["choice", "writes", "bits", "mean"]
    assert all(len(row["scores"]) == 2 for row in rows)
    assert summary["tasks"]["settings"]["max_length"] == 128
    assert "choice (1-shot), acc" in again.stdout and "% of dense" in again.stdout
