"""Fine-tuning with the zeros held: killed and resumed to the same bytes, and by the command."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from sparsify.formats.verify import check_files, masks_of
from tests.integration.recoveries import Worker, die_at_step, exit_codes, run

NUM_RECORDS, BATCH, LENGTH = 96, 4, 32

RTOL, ATOL = 1e-5, 1e-5
"""of two workers beside one: float32 sums in another order made 1e-7 in losses of 5, and 7e-7 in
weights that move by 0.37"""

LORA: dict[str, Any] = {"adapter": "lora", "rank": 4, "learning_rate": 1e-2}

KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (1, {}),
    "full in bf16": (1, {"precision": "bf16"}),
    "full, ZeRO-3": (2, {"zero_stage": 3}),
    "masked": (2, LORA),
    "masked in bf16, ZeRO-1": (2, {**LORA, "precision": "bf16", "zero_stage": 1}),
    "at_merge": (1, {**LORA, "merge": "at_merge"}),
    "qlora": (1, {**LORA, "adapter": "qlora"}),
    "qlora in bf16": (2, {**LORA, "adapter": "qlora", "precision": "bf16"}),
}
"""kind -> workers and settings"""


def write_records(path: Path) -> Path:
    """Records that repeat a letter, of every length."""
    rng = random.Random(0)
    lines = []
    for _ in range(NUM_RECORDS):
        letter, size = rng.choice("abcdef"), rng.randint(1, 9)
        lines.append(json.dumps({"prompt": f"{letter}{size}=", "completion": letter * size}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def payload_of(base: Path, out: Path, **settings: Any) -> dict[str, Any]:
    from conf.options.data import DataConfig
    from conf.options.finetune import FinetuneConfig
    from conf.options.run import RunConfig
    from conf.schema import Config

    scratch = out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    given = {
        "epochs": 4, "batch_size": BATCH, "micro_batch_size": 2, "checkpoint_every_steps": 4,
        "learning_rate": 1e-3, "num_warmup_steps": 2, "template": "raw", "zero_stage": 2,
        **settings,
    }  # fmt: skip
    records = out / "records.jsonl"
    if not records.exists():
        write_records(records)
    data = DataConfig(sequence_length=LENGTH, train=str(records))
    config = Config(
        stages=["finetune"], run=RunConfig(from_="x"), data=data, finetune=FinetuneConfig(**given)
    )
    return {
        "config": config, "student": base / "student", "is_dense": False,
        "dense": base / "teacher", "teacher": None, "rotation": None,
        "form": "prompt/completion", "folder": out, "scratch": scratch, "run_dir": out,
        "store": scratch / "rows", "heldout": None, "adapter_from": None,
    }  # fmt: skip


def finetune(rank: int, base: Path, out: Path, kill_at: int | None, settings: dict) -> None:
    """Fine-tune to the end, or until a step before which the process dies."""
    from jobs.workers import finetune as worker

    context = Worker(rank, dist.get_world_size(), name="finetune")
    payload = payload_of(base, out, **settings)
    if rank == 0 and not worker.has_rows(payload):
        worker.prepare_rows(context, payload)
    dist.barrier()
    if kill_at is not None:
        die_at_step(worker, kill_at)
    figures = worker.finetune_on_worker(context, payload)
    assert (figures is None) == (rank > 0), "one worker writes"
    if figures is not None:
        (out / "figures.json").write_text(json.dumps({**figures, "said": context.said}))


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_gives_the_same_bytes_with_every_zero(
    base: Path, tmp_path: Path, kind: str
) -> None:
    size, settings = KINDS[kind]
    run(size, finetune, base, tmp_path / "whole", None, settings)
    assert -signal.SIGKILL in exit_codes(size, finetune, base, tmp_path / "cut", 6, settings)
    assert not (tmp_path / "cut/model").exists()
    run(size, finetune, base, tmp_path / "cut", None, settings)
    whole, cut = (json.loads((tmp_path / n / "figures.json").read_text()) for n in ("whole", "cut"))
    assert any("finetune: continues after step 4" in line for line in cut["said"])
    assert cut["steps"] == whole["steps"]
    assert whole["steps"][-1]["loss"] < 0.9 * whole["steps"][0]["loss"]
    assert whole["steps"][0]["kl"] is None, "no teacher"
    folders = [tmp_path / name / "model" for name in ("whole", "cut")]
    names = sorted(path.name for path in folders[0].iterdir() if path.is_file())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    counts = check_files(folders[0], *masks_of(folders[0]))
    assert counts["num_violations"] == 0
    assert counts["num_zeros"] == counts["num_weights"] // 2
    before = load_file(base / "student/model.safetensors")
    after = load_file(folders[0] / "model.safetensors")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("q_proj" in name for name in moved)
    assert json.loads((folders[0] / "sparsity.json").read_text())["provenance"][
        "num_finetuning_tokens"
    ]


def finetune_each(rank: int, base: Path, out: Path, stages: tuple[int, ...]) -> None:
    """Adapters under masks, trained once with each ZeRO stage."""
    for stage in stages:
        settings = {**LORA, "zero_stage": stage, "micro_batch_size": 1}
        finetune(rank, base, out / str(stage), None, settings)
        dist.barrier()


def test_two_workers_train_the_adapters_of_one(base: Path, tmp_path: Path) -> None:
    """Of the same batches: losses, norms of the gradient (a mean, no sum), and what is merged."""
    run(1, finetune_each, base, tmp_path / "one", (2,))
    run(2, finetune_each, base, tmp_path / "two", (0, 1, 2))
    before = load_file(base / "student/model.safetensors")
    alone = load_file(tmp_path / "one/2/model/model.safetensors")
    steps = json.loads((tmp_path / "one/2/figures.json").read_text())["steps"]
    for stage in "012":
        folder = tmp_path / "two" / stage
        figures = json.loads((folder / "figures.json").read_text())
        for name in ("loss", "grad_norm"):
            found = [step[name] for step in figures["steps"]]
            assert found == pytest.approx([step[name] for step in steps], rel=RTOL), name
        for name, weight in load_file(folder / "model/model.safetensors").items():
            assert (weight - alone[name]).abs().max() < ATOL, name
            assert torch.equal(alone[name], before[name]) == ("_proj" not in name)
        assert check_files(folder / "model", *masks_of(folder / "model"))["num_violations"] == 0


def test_at_its_time_limit_it_ends_with_what_it_has(base: Path, tmp_path: Path) -> None:
    """Killed while it writes, it makes no more steps."""
    settings = {"time_limit_hours": 1e-9, "on_time_limit": "finish"}
    out, model = tmp_path / "out", tmp_path / "out/model"
    files = []
    for _ in range(2):
        run(1, finetune, base, out, None, settings)
        figures = json.loads((out / "figures.json").read_text())
        assert (figures["is_cut"], [step["step"] for step in figures["steps"]]) == (True, [1])
        assert any("the time limit ends it after step 1 of" in line for line in figures["said"])
        files.append((model / "model.safetensors").read_bytes())
        assert check_files(model, *masks_of(model))["num_violations"] == 0
        shutil.rmtree(model)
    assert files[0] == files[1]
    run(1, finetune, base, tmp_path / "short", None, {**settings, "epochs": 0.01})
    figures = json.loads((tmp_path / "short/figures.json").read_text())
    assert (figures["is_cut"], len(figures["steps"])) == (False, 1), "it was the last step anyway"
    assert not any("the time limit" in line for line in figures["said"])


def test_the_command_trains_a_pruned_and_a_dense_model_and_scores_them(
    run_job, small: list[str], tmp_path: Path
) -> None:
    records = write_records(tmp_path / "records.jsonl")
    words = [
        *small, f"finetune.data={records}", "finetune.template=raw", "finetune.epochs=2",
        "finetune.batch_size=4", "finetune.micro_batch_size=2", "prune.method=magnitude",
        "prune.baselines=[]",
    ]  # fmt: skip
    sparse = tmp_path / "sparse"
    done = run_job("prune", "stages=[prune,finetune,evaluate]", f"run.dir={sparse}", *words)
    assert done.returncode == 0, done.stderr
    summary = json.loads((sparse / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["results"]}
    assert list(rows) == ["dense", "magnitude", "finetuned"]
    assert rows["finetuned"]["violations"] == 0
    assert rows["finetuned"]["label"] == "fine-tuned"
    words = [word for word in words if word.startswith(("model.path", "finetune", "data", "cl"))]
    dense = tmp_path / "dense"
    done = run_job("finetune", f"run.dir={dense}", *words)
    assert done.returncode == 0, done.stderr
    assert not (dense / "finetune/model/sparsity.json").exists()
    # The dense one teaches the sparse one, whose run goes on from its pruning.
    taught = tmp_path / "taught"
    teacher = f"finetune.teacher={dense / 'finetune/model'}"
    done = run_job(
        "finetune", f"run.from={sparse / 'prune'}", f"run.dir={taught}", *words, teacher,
        "finetune.square_head_weight=1", "finetune.kl_weight=0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads((taught / "finetune/record.json").read_text())["metrics"]
    assert metrics["gate"]["num_violations"] == 0
    assert metrics["steps"][-1]["square_head"] < metrics["steps"][0]["square_head"]


def test_bad_input_is_one_line_before_anything_starts(
    run_job, small: list[str], tmp_path: Path
) -> None:
    words = [word for word in small if word.startswith(("model.path", "data", "cluster"))]
    records = write_records(tmp_path / "records.jsonl")
    for given, said in (
        ([], "finetune.data: is required"),
        ([f"finetune.data={records}"], "finetune.template: the model's tokenizer has no chat"),
        (["finetune.data=stdlib"], "finetune.num_tokens: is required because stdlib is text"),
        ([f"finetune.data={records}", "finetune.kl_weight=1"], "finetune.kl_weight: compares with"),
        ([f"finetune.data={records}", "finetune.batch_size=3"], "finetune.batch_size=3 with"),
    ):
        done = run_job("finetune", f"run.dir={tmp_path / 'run'}", *words, *given)
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if not line.strip().startswith("run ")]
        assert len(lines) == 1
        assert said in lines[0]
        assert "distill" not in lines[0]
