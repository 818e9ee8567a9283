"""Pruning with rotations, then SquareHead: one basis for both, from any start, also when killed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from sparsify.distillation.loss import square_head
from sparsify.formats.sparse_folder import ROTATION
from sparsify.models.load import load_model
from sparsify.rotation.basis import Rotation, fold_rotation
from tests.integration.commands import Command, wait_until

PRUNED, MODEL = "prune/twofour", "distill/model"


@pytest.fixture(scope="module")
def options(small: list[str]) -> list[str]:
    return [
        *small, "prune.method=twofour", "prune.baselines=[magnitude]", "prune.rotation_steps=60",
        "distill.square_head_weight=1.0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(run_job, options, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "rotated"
    done = run_job("prune", *options, "stages=[prune,distill]", f"run.dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


def metrics_of(run_dir: Path, stage: str) -> dict:
    record = json.loads((run_dir / stage / "record.json").read_text(encoding="utf-8"))
    return record["metrics"]


def losses_of(run_dir: Path) -> list[float]:
    return [step["loss"] for step in metrics_of(run_dir, "distill")["steps"]]


def provenance_of(folder: Path) -> dict:
    return json.loads((folder / "sparsity.json").read_text(encoding="utf-8"))["provenance"]


def test_hidden_states_are_compared_in_one_basis(undisturbed: Path, tiny_model_dir: Path) -> None:
    student, teacher = load_model(undisturbed / PRUNED), load_model(tiny_model_dir)
    ids = torch.randint(3, 300, (8, 64), generator=torch.Generator().manual_seed(0))

    def distance() -> float:
        outputs = [model(input_ids=ids, output_hidden_states=True) for model in (student, teacher)]
        return float(square_head(*(output.hidden_states for output in outputs)))

    with torch.no_grad():
        wrong = distance()
        fold_rotation(teacher, Rotation.load(undisturbed / PRUNED / ROTATION))
        right = distance()
    assert 2 * right < wrong, "the bases do not differ enough for this test"
    metrics = metrics_of(undisturbed, "distill")
    assert metrics["is_teacher_rotated"]
    assert metrics["steps"][0]["square_head"] < (right * wrong) ** 0.5


def test_folders_say_and_carry_their_rotation(undisturbed: Path) -> None:
    facts = provenance_of(undisturbed / PRUNED)
    assert facts["rotated_model_sha256"] == facts["dense_sha256"]
    assert provenance_of(undisturbed / MODEL)["rotation_sha256"] == facts["rotation_sha256"]
    rotation = (undisturbed / PRUNED / ROTATION).read_bytes()
    assert (undisturbed / MODEL / ROTATION).read_bytes() == rotation
    assert "rotation_sha256" not in provenance_of(undisturbed / "prune/magnitude")
    done = metrics_of(undisturbed, "prune")["rotation"]
    assert done["pruned_share"][1] < done["pruned_share"][0]
    assert done["seconds"] > 0


def test_recovery_alone_from_a_copied_model_is_the_same(
    undisturbed: Path, run_job, options, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / PRUNED, tmp_path / "pruned")
    shutil.copytree(tiny_model_dir, tmp_path / "dense")
    words = [w for w in options if w.startswith(("data.", "distill.", "tracker.", "cluster."))]
    start = [f"run.from={tmp_path / 'pruned'}", f"run.dir={tmp_path / 'out'}"]
    done = run_job("distill", *words, *start, f"model.teacher={tmp_path / 'dense'}")
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "out") == losses_of(undisturbed)


def test_dense_weights_in_the_students_basis_end_in_the_pattern(
    undisturbed: Path, run_job, options, tmp_path: Path
) -> None:
    words = [w for w in options if w.startswith(("data.", "distill.", "tracker.", "cluster."))]
    dense = [
        "distill.moving_share=0.25", "distill.moving_start=dense", "distill.mask_refresh_steps=1",
    ]  # fmt: skip
    start = [f"run.from={undisturbed / PRUNED}", f"run.dir={tmp_path / 'out'}"]
    done = run_job("distill", *words, "distill.square_head_weight=0", *dense, *start)
    assert done.returncode == 0, done.stderr
    metrics, before = metrics_of(tmp_path / "out", "distill"), metrics_of(undisturbed, "distill")
    assert metrics["is_teacher_rotated"]
    assert metrics["gate"]["num_violations"] == 0
    assert metrics["gate"]["num_weights"] == before["gate"]["num_weights"]
    assert metrics["mask_share_moved"] > 0
    rotation = (undisturbed / PRUNED / ROTATION).read_bytes()
    assert (tmp_path / "out" / MODEL / ROTATION).read_bytes() == rotation


def test_a_dense_model_alone_becomes_one_with_the_pattern(
    run_job, options, tiny_model_dir: Path, tmp_path: Path
) -> None:
    words = [
        w
        for w in options
        if w.startswith(("data.", "distill.", "tracker.", "cluster.", "evaluate."))
    ]
    start = [f"run.from={tiny_model_dir}", f"model.teacher={tiny_model_dir}", "prune.pattern=1:4"]
    start += ["stages=[distill,evaluate]", f"run.dir={tmp_path / 'out'}"]
    done = run_job("prune", *words, *start, "distill.moving_share=0.25")
    assert done.returncode == 0, done.stderr
    assert "75.0% of those of 14 layers are alive under their masks" in done.stderr
    results = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))["results"]
    assert [(row["name"], row["violations"]) for row in results] == [
        ("dense", None), ("recovered", 0),
    ]  # fmt: skip
    assert metrics_of(tmp_path / "out", "distill")["gate"]["num_violations"] == 0


def test_another_teacher_is_refused_in_one_line(
    undisturbed: Path, run_job, options, tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    words = [w for w in options if w.startswith(("data.", "distill.", "tracker.", "cluster."))]
    start = [f"run.from={undisturbed}", f"run.dir={tmp_path / 'out'}", f"model.teacher={other}"]
    done = run_job("distill", *words, *start)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: model.teacher={other}: ")
    assert last.endswith("or set distill.square_head_weight=0")


def test_kill_9_while_pruning_and_recovering_changes_nothing(
    undisturbed: Path, environment, options, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"

    def start() -> Command:
        words = [*options, f"run.dir={run_dir}", "stages=[prune,distill]"]
        return Command("prune", *words, environment=environment, folder=tmp_path)

    moments = (
        lambda: (run_dir / ".prune.partial/scratch/rotated").exists(),
        lambda: list((run_dir / ".distill.partial/scratch").glob("step-*")),
    )
    for ready in moments:
        process = start()
        wait_until(ready, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = start().finished(900)
    assert done.returncode == 0, done.stderr
    assert losses_of(run_dir) == losses_of(undisturbed)
    for folder in (PRUNED, MODEL):
        for path in sorted((undisturbed / folder).rglob("*.safetensors")):
            again = run_dir / folder / path.relative_to(undisturbed / folder)
            assert again.read_bytes() == path.read_bytes(), f"{path} is not the same to the bit"
