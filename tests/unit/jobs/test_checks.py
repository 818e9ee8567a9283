"""What is asked for all stages together before the first one, by a run and by a dry run."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.errors import ClusterError
from cluster.machine import require_answer, require_machine
from cluster.spec import ClusterSpec
from conf.schema import Config
from jobs.cli.compose import load_config
from jobs.pipeline import describe_plan
from jobs.workers import checks
from sparsify.errors import InputError
from tests.conftest import message, stage_record


@pytest.fixture
def plan(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The plan of a command over the tiny model, with these words too."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"text {i}" for i in range(60)))

    def describe(*words: str) -> list[str]:
        small = ["data.sequence_length=64", f"model.path={tiny_model_dir}"]
        text = [f"data.calibration={tmp_path / 'text.txt'}", f"run.dir={tmp_path / 'run'}"]
        return describe_plan(load_config("prune", [*small, *text, *words]))

    return describe


def test_words_that_leave_no_room_for_more_are_refused(plan: Callable) -> None:
    assert plan("evaluate.prompt=the cat")
    with pytest.raises(InputError) as error:
        plan("evaluate.prompt=" + "cat " * 2000)
    assert re.match(r"evaluate.prompt: has \d+ tokens and the model \d+ positions", message(error))
    assert plan("stages=[prune]", "evaluate.prompt=" + "cat " * 2000), "nothing is written"


def test_a_plan_writes_nothing(plan: Callable, tmp_path: Path) -> None:
    assert "  prune     to run    one-shot pruned models, one per method" in plan()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model.path=/no/such"], ["/no/such", "no such folder"]),
        (["data.calibration=none.txt"], ["none.txt", "no such file"]),
        (["+cluster=h100x32"], ["h100x32", "32 GPUs on 4 node(s)", "RAY_ADDRESS"]),
        (["prune.pattern=2:6", "prune.block_size=126"], ["groups of 6", "prune.skip"]),
        (["prune.skip=[nothing]"], ["prune.skip", "matches no linear layer"]),
        (["data.sequence_length=256"], ["data.sequence_length=256", "128 positions"]),
        (["distill.teacher_cache=/none"], ["/none"]),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    plan: Callable, words: list[str], parts: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        plan(*words)
    assert all(part in message(error) for part in parts)


def test_a_plan_says_that_nodes_are_checked_first(plan: Callable) -> None:
    said = "preflight: of every node, before the first stage; cluster.preflight.when=never skips it"
    assert said in plan("cluster.preflight.when=always")
    assert not any(line.startswith("preflight") for line in plan())


def test_layers_that_are_skipped_need_not_divide(plan: Callable) -> None:
    """Columns of the tiny model: 128 of down_proj, 64 of the others."""
    words = ["prune.pattern=2:128", "stages=[prune]"]
    with pytest.raises(InputError, match="q_proj: 64 input columns cannot be cut"):
        plan(*words)
    plan(*words, "prune.skip=[self_attn.*,mlp.gate_proj,mlp.up_proj]")


def test_a_damaged_stage_is_named_unless_it_is_to_be_made_again(
    plan: Callable, tmp_path: Path
) -> None:
    (tmp_path / "run" / "prune").mkdir(parents=True)
    lost = {"twofour/model.safetensors": {"bytes": 1, "sha256": ""}}
    (tmp_path / "run" / "prune" / "record.json").write_text(stage_record(outputs=lost))
    with pytest.raises(InputError, match=r"is missing; .*run\.redo=\[prune\]"):
        plan("stages=[prune]")
    assert any(line.startswith("  prune     to run") for line in plan("run.redo=[prune]"))


def test_a_family_that_recovery_cannot_train_is_refused_by_its_shapes(
    tiny_model_dir: Path, monkeypatch
) -> None:
    model = checks.shapes_of(tiny_model_dir)
    model.set_output_embeddings(torch.nn.Identity())
    monkeypatch.setattr(checks, "shapes_of", lambda _: model)
    with pytest.raises(InputError, match="its head is Identity"):
        checks.check_distill(Config(), tiny_model_dir)


def test_another_vocabulary_than_the_dense_model_s(
    plan: Callable, tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    with pytest.raises(InputError, match=r"vocabulary of 999 tokens .*model\.teacher"):
        plan("stages=[evaluate]", f"run.from={other}", f"model.teacher={tiny_model_dir}")


def test_machines_are_counted_where_no_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    one_gpu = ClusterSpec(num_workers=2, gpus_per_worker=1)
    require_machine(ClusterSpec(), 0)
    require_machine(one_gpu, 2)
    for spec, gpus in ((one_gpu, 1), (ClusterSpec(num_nodes=2), 8)):
        with pytest.raises(ClusterError, match="RAY_ADDRESS is not set"):
            require_machine(spec, gpus)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")
    require_machine(one_gpu, 0)


def test_an_address_at_which_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        require_answer()
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS={address}: no Ray answers"):
        require_answer()
    for other in ("auto", "local", ""):
        monkeypatch.setenv("RAY_ADDRESS", other)
        require_answer()
