"""Options by which a stage asks for a cluster of its own: typed, shown, submitted, planned, run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kinds import get_kind
from cluster.stages import STAGED, StagedClusterSpec
from conf.schema import PlanJobConfig, to_dict
from jobs import manage
from jobs.cli import submit
from jobs.cli.command import find_command
from jobs.cli.compose import load_config
from jobs.cli.main import main
from jobs.pipeline import _whole, describe_plan
from jobs.planning.run import make_plan
from jobs.runs import session
from sparsify.errors import InputError

SMALL = ["cluster.stages.quantize.num_nodes=1", "cluster.stages.quantize.num_workers=8",
         "cluster.stages.quantize.slurm.time=2:00:00"]  # fmt: skip

SLURM = ["+cluster=slurm-h100x32", "data.sequence_length=256"]


def run(*argv: str, job: str = "prune") -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"jobs.{job}", *argv])
        with pytest.raises(SystemExit) as end:
            main(find_command(job))
    return int(end.value.code or 0)


PRESET = """# @package _global_
defaults: [slurm-h100x32, _self_]
cluster:
  stages:
    quantize: {num_nodes: 1, num_workers: 8, slurm: {time: "2:00:00"}}
"""


def test_a_preset_says_what_the_command_line_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "site.yaml").write_text(PRESET)
    shown = []
    for words in (
        [f"--config-dir={tmp_path}", "+cluster=site"],
        ["+cluster=slurm-h100x32", *SMALL],
    ):
        assert run(*words, "--print-config") == 0
        shown.append(yaml.safe_load(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert shown[0]["cluster"]["stages"]["quantize"]["slurm"]["time"] == "2:00:00"
    assert shown[0]["cluster"]["stages"]["quantize"]["num_workers"] == 8
    assert shown[0]["cluster"]["stages"]["prune"]["num_workers"] is None
    # A command without stages takes the preset, and has no such option.
    site = [f"--config-dir={tmp_path}", "+cluster=site", "tokenize.out=x", "data.train=y"]
    assert run(*site, "--print-config", job="tokenize") == 0
    assert "stages" not in yaml.safe_load(capsys.readouterr().out)["cluster"]
    assert run(*site, *SMALL, "--print-config", job="tokenize") == 2
    assert (
        "cluster.stages.quantize.num_nodes: is not used by jobs.tokenize" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("cluster.stages.quntize.num_workers=1",
         "did you mean cluster.stages.quantize.num_workers or"),
        ("cluster.stages.report.num_workers=1",
         "options of cluster.stages: pretrain.*, drop.*, prune.*, distill.*, finetune.*, "
         "evaluate.*, quantize.*, export.*"),
        ("cluster.stages.prune.kind=ray", "options of cluster.stages.prune: num_nodes, "),
        ("cluster.stages.prune.num_workers=two", "must be a whole number"),
        ("cluster.stages.prune.slurm.time=soon", "cluster.stages.prune.slurm.time='soon': must be"),
        ("run.until=quantise", "run.until=quantise: unknown value (did you mean quantize?)"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(word) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_help_says_it_once_for_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    told = capsys.readouterr().out
    assert told.count("  cluster.stages.STAGE.num_workers=null  (int or null)\n") == 1
    assert all(name in told for name in STAGED)
    assert run("--help", "stages.quantize.num") == 0
    assert "  cluster.stages.quantize.num_workers=null" in capsys.readouterr().out


def test_rules_look_at_the_cluster_of_the_stage_they_are_for() -> None:
    rows = ["distill.batch_size=8", "distill.micro_batch_size=4", "cluster.num_workers=3"]
    with pytest.raises(InputError, match=r"cluster\.num_workers=3"):
        load_config("prune", rows)
    config = load_config("prune", [*rows, "cluster.stages.distill.num_workers=2"])
    assert config.of_stage("distill").cluster.num_workers == 2
    assert config.of_stage("quantize").cluster.num_workers == 3  # though distill could not have it
    with pytest.raises(InputError, match="float16: needs GPUs"):
        load_config("prune", ["+cluster=h100x8", "model.dtype=float16",
                              "cluster.stages.evaluate.gpus_per_worker=0"])  # fmt: skip
    with pytest.raises(InputError, match=r"run\.until=quantize: is not a stage of this run"):
        load_config("prune", ["stages=[prune]", "run.until=quantize"])


def test_this_machine_must_hold_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ["data.sequence_length=64", "cluster.stages.quantize.num_nodes=2"]
    with pytest.raises(InputError, match=r"needs 2 CPU workers on 2 node"):
        describe_plan(load_config("prune", words))
    told = describe_plan(load_config("prune", [*words, "stages=[prune]"]))
    assert "2 node" not in "\n".join(told)
    other = ["data.sequence_length=64", "cluster.stages.quantize.num_workers=1"]
    told = describe_plan(load_config("prune", other))
    (line,) = (line for line in told if "(1 CPU workers on 1 node(s))" in line)
    assert line.split()[0] == "quantize"


def test_dry_run_shows_all_scripts_and_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*SLURM, *SMALL, "--dry-run") == 0
    shown = capsys.readouterr().out
    folder = f"{tmp_path}/runs/embedded-2-4-twofour/.cluster"
    for name in ("job1.sh", "job2.sh", "job3.sh", "config.yaml"):
        assert f"\n--- {folder}/{name}\n" in shown
    assert "part 2 of 3: quantize; it starts when job1.sh has ended well" in shown
    assert list(tmp_path.iterdir()) == []


def test_submitting_prints_every_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("sbatch", f"echo $# >>{tmp_path}/calls; wc -l <{tmp_path}/calls\n"),
        ("scontrol", "for last; do :; done\necho JobId=$last JobState=PENDING Reason=None\n"),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    assert run(*SLURM, *SMALL, "stages=[prune,quantize]") == 0
    said = capsys.readouterr().out
    assert "submitted: slurm job 2,4 for " in said
    assert "job 4: quantize, after job 2\n" in said
    assert manage.main(["status"]) == 0
    said = capsys.readouterr().out
    assert "slurm job 2,4: waiting (prune: waiting (pending" in said
    assert manage.main(["list"]) == 0
    assert "slurm  2,4  waiting" in capsys.readouterr().out


def test_kubernetes_is_asked_for_the_largest_stage() -> None:
    config = load_config("prune", [
        "+cluster=h100x8", "cluster.kind=kuberay", "cluster.kuberay.image=x",
        "cluster.stages.prune.num_nodes=4", "cluster.stages.prune.num_workers=32", *SMALL,
    ])  # fmt: skip
    spec = submit.allocation(config)
    job = submit.job_of(find_command("prune"), config, [])
    assert job.parts == ()
    manifest = yaml.safe_load(get_kind("kuberay").files(spec, job)["rayjob.yaml"])
    (group,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == 4
    resources = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (resources["cpu"], resources["nvidia.com/gpu"]) == ("64", "8")


def test_a_job_that_does_a_part_keeps_to_its_own_cluster() -> None:
    config = load_config("prune", [*SLURM, *SMALL, "run.until=distill"])
    assert submit.parts_of(config) == ()
    assert submit.allocation(config).num_nodes == 4
    assert "stages" in to_dict(config)["cluster"]
    typed = "python -m jobs.prune run.until=prune 'run.dir=a b'"
    assert _whole(typed) == _whole("python -m jobs.prune 'run.dir=a b' run.until=distill")


class Recorded(contextlib.AbstractContextManager[Any]):
    """An executor that says when it comes and goes."""

    dashboard = None

    def __init__(self, spec: StagedClusterSpec, seen: list[str]) -> None:
        self.spec, self.seen = spec, seen

    def __enter__(self) -> Recorded:
        self.seen.append(f"+{self.spec.num_workers}")
        return self

    def __exit__(self, *_: object) -> None:
        self.seen.append(f"-{self.spec.num_workers}")


def test_one_cluster_at_a_time_and_a_new_one_only_for_other_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(session, "new_cluster", lambda spec, *_: Recorded(spec, seen))
    config = load_config("prune", [
        "cluster.stages.evaluate.num_workers=1", "cluster.stages.quantize.num_workers=1",
        "cluster.stages.distill.slurm.time=60",
    ])  # fmt: skip
    nothing: Any = None
    with contextlib.ExitStack() as stack:
        clusters = session.Clusters(Path("run"), nothing, nothing, stack)
        for stage in ("prune", "distill", "evaluate", "quantize", "export"):
            spec = config.of_stage(stage).cluster
            assert clusters.open(spec).spec.num_workers == spec.num_workers
    assert seen == ["+2", "-2", "+1", "-1", "+2", "-2"]


def test_a_plan_is_made_here_for_whatever_kind_of_cluster() -> None:
    config = load_config("plan", ["model.path=x", *SLURM])
    assert config.cluster.kind == "slurm"
    assert not submit.runs_elsewhere(config)


def test_the_plan_counts_the_workers_of_each_stage() -> None:
    words = ["model.path=meta-llama/Llama-3.1-8B", "+cluster=h100x32"]
    whole: PlanJobConfig = load_config("plan", words)
    small: PlanJobConfig = load_config("plan", [*words, *SMALL])
    found, less = make_plan(whole, lambda _: whole), make_plan(small, lambda _: small)
    times, own = found["time"]["stages_s"], less["time"]["stages_s"]
    assert own["quantize"] > times["quantize"]
    assert {**own, "quantize": 0} == {**times, "quantize": 0}
    hours = (32 * (sum(own.values()) - own["quantize"]) + 8 * own["quantize"]) / 3600
    assert less["time"]["gpu_hours"] == pytest.approx(hours)
