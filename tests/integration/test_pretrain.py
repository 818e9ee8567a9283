"""A dense model from random weights: killed and resumed to the same bytes, and by the command."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.integration.conftest import Run
from tests.integration.recoveries import Worker, die_at_step, exit_codes, run

_SIZES = {
    "vocab_size": 280, "hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2,
    "num_kv_heads": 1,
}  # fmt: skip


def write_text(path: Path) -> Path:
    """Documents in which letters follow each other by a rule."""
    rng = random.Random(0)
    lines = []
    for _ in range(300):
        start = rng.randint(0, 25)
        text = "".join(chr(97 + (start + 3 * place) % 26) for place in range(rng.randint(40, 90)))
        lines.append(json.dumps({"text": text}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def pretrain(rank: int, out: Path, kill_at: int | None) -> None:
    """Train to the end, or until a step before which the process dies."""
    from conf.options.data import DataConfig
    from conf.options.pretrain import PretrainConfig
    from conf.schema import Config
    from jobs.runs.artifact import StageWriter
    from jobs.workers import pretrain as worker

    settings = PretrainConfig(
        **_SIZES, num_tokens=12 * 4 * 32, batch_size=4, micro_batch_size=2, num_warmup_steps=2,
        checkpoint_every_steps=4, heldout_every_steps=6,
    )  # fmt: skip
    text = write_text(out.with_suffix(".jsonl"))
    data = DataConfig(calibration=str(text), sequence_length=32)
    config = Config(stages=["pretrain"], data=data, pretrain=settings)
    writer = StageWriter(out, "pretrain", {}, "command")
    context, payload = Worker(rank, 1, name="pretrain"), worker.make_payload(config, writer, out)
    if not worker.is_prepared(payload):
        worker.prepare(context, payload)
    if kill_at is not None:
        die_at_step(worker.finetune, kill_at)
    figures = worker.pretrain_on_worker(context, payload)
    assert worker.check_result(writer.folder / "model")["num_violations"] == 0
    (out / "figures.json").write_text(json.dumps({**figures, "said": context.said}))


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run(1, pretrain, tmp_path / "whole", None)
    assert exit_codes(1, pretrain, tmp_path / "cut", 6) == [-signal.SIGKILL]
    start = tmp_path / "cut/.pretrain.partial/scratch/start"
    before = {path.name: path.stat().st_mtime_ns for path in start.iterdir()}
    run(1, pretrain, tmp_path / "cut", None)
    assert before == {path.name: path.stat().st_mtime_ns for path in start.iterdir()}
    whole, cut = (json.loads((tmp_path / n / "figures.json").read_text()) for n in ("whole", "cut"))
    assert any("pretrain: continues after step 4" in line for line in cut["said"])
    assert cut["steps"] == whole["steps"]
    assert cut["heldout"] == whole["heldout"]
    assert [row["step"] for row in whole["heldout"]] == [6, 12]
    assert whole["steps"][-1]["loss"] < whole["steps"][0]["loss"]
    assert whole["steps"][0]["kl"] is None, "no teacher"
    folders = [tmp_path / name / ".pretrain.partial/result/model" for name in ("whole", "cut")]
    names = sorted(path.name for path in folders[0].iterdir())
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(names)
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def words_of(run_dir: Path) -> list[str]:
    """Options of a command that takes four steps."""
    text = write_text(run_dir.with_suffix(".jsonl"))
    return [
        f"data.calibration={text}", "data.sequence_length=32", f"run.dir={run_dir}",
        *(f"pretrain.{name}={value}" for name, value in _SIZES.items()),
        "pretrain.num_tokens=1024", "pretrain.batch_size=8", "pretrain.micro_batch_size=4",
        "evaluate.num_tokens=64", "tracker.wandb=off",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one plain process."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    words = [*words_of(run_dir), "cluster.executor=plain", "cluster.num_workers=1"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.pretrain", *words], capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run_dir


def test_the_command_leaves_a_scored_model_that_any_library_loads(by_one: Path) -> None:
    run_dir = by_one
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [row["name"] for row in summary["results"]] == ["dense"]
    assert len(summary["pretraining"]["steps"]) == 4
    folder = run_dir / "pretrain/model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.hidden_size == 16
    card = (folder / "README.md").read_text()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {count:,} |" in card
    assert f"{summary['results'][0]['perplexity']:.3f} per token" in card


def test_two_workers_under_ray_train_what_one_process_does(
    by_one: Path, run_job: Run, tmp_path: Path
) -> None:
    words = [*words_of(tmp_path / "run"), "cluster.executor=ray", "cluster.num_workers=2"]
    done = run_job("pretrain", *words)
    assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((folder / "summary.json").read_text()) for folder in (by_one, tmp_path / "run")
    )
    assert two["run"]["num_workers"] == 2
    losses = [[step["loss"] for step in run["pretraining"]["steps"]] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    scores = [run["results"][0]["perplexity"] for run in (one, two)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
