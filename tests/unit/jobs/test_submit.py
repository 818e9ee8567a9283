"""From a command line to a submitted job, and jobs.manage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conf.schema import to_dict
from jobs import manage
from jobs.cli import submit
from jobs.cli.command import find_command
from jobs.cli.compose import load_config
from jobs.cli.main import main
from sparsify.errors import InputError

SLURM = ["+cluster=slurm-h100x32", "data.sequence_length=256"]


def run(*argv: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["jobs.prune", *argv])
        with pytest.raises(SystemExit) as end:
            main(find_command("prune"))
    return int(end.value.code or 0)


def composed(folder: Path) -> dict:
    """What the job's own command line makes of the file of options."""
    from jobs.cli.compose import launch

    found = []
    launch(
        find_command("prune"), [], [f"--config-dir={folder}", "--config-name", "config"],
        found.append,
    )  # fmt: skip
    return to_dict(found[0])


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
AWKWARD = [
    "1e5", "on", "null", "~", "007", "${run.seed}", "\\${x}", "\\\\${x}", "a: b", "- a", "'x'",
    '"x"', "#x", "a\nb", "x\\", "${", "a\x85b", "a\u2028b",
    "!!python/name:os.system", "&a", "*a", "%",
]  # fmt: skip


@given(values=st.lists(texts, min_size=10, max_size=10))
@settings(max_examples=5, deadline=None, phases=[Phase.generate])
def test_options_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, values: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("job")
    config = load_config("prune", ["+cluster=slurm-h100x32", f"run.dir={folder}/run"])
    config.model.path, config.data.train, config.prune.skip = *values[:2], [*values, *AWKWARD]
    command = find_command("prune")
    job = submit.job_of(command, config, [])
    text = submit._options_file(command, config, job)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    config.cluster.kind = "local"
    assert composed(folder) == to_dict(config)


def test_dry_run_shows_the_script_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*SLURM, "cluster.slurm.account=lab", "--dry-run") == 0
    shown = capsys.readouterr().out
    for line in ("#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --account=lab",
                 f"--- {tmp_path}/runs/embedded-2-4-twofour/.cluster/config.yaml"):  # fmt: skip
        assert f"\n{line}\n" in shown
    assert list(tmp_path.iterdir()) == []


def test_what_would_refuse_the_job_is_said_before_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*SLURM, "model.path=/models/none") == 2
    assert "/models/none: there is no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_scheduler_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert run(*SLURM) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: cannot submit embedded-2-4-twofour: cluster.kind=slurm needs sbatch"
    )
    assert said.count("\n") == 1


def test_mistakes_are_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for word, said in (
        ("cluster.kind=slrum", "cluster.kind=slrum: no such kind; use "),
        ("cluster.slurm.partition=$(x)", "cluster.slurm.partition='$(x)': must be names"),
        ("cluster.num_nodes=5", "cluster.num_workers=32: does not divide into cluster.num_"),
        ("cluster.slurm.partion=x", "did you mean cluster.slurm.partition"),
    ):
        assert run(*SLURM, word) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_job_in_this_process_and_its_management(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that refuses its input, submitted to the in-process kind, then looked at."""
    monkeypatch.chdir(tmp_path)
    words = ["cluster.kind=inprocess", "model.path=/no/such/model", "run.dir=runs/a b"]
    assert run(*words) == 0
    assert "submitted: inprocess job" in capsys.readouterr().out
    record = json.loads((tmp_path / "runs/a b/.cluster/job.json").read_text())
    assert record["typed"].endswith("'run.dir=runs/a b'")
    assert manage.main(["list"]) == 0
    assert "runs/a b  inprocess" in capsys.readouterr().out
    assert manage.main(["status", "runs/a b"]) == 0
    said = capsys.readouterr().out
    assert "failed (exit code 2)" in said
    assert "finished stages: none" in said
    assert manage.main(["logs"]) == 0  # that of the latest
    assert "/no/such/model" in capsys.readouterr().out
    assert manage.main(["logs", "--follow"]) == 2
    assert manage.main(["cancel", "runs/a b"]) == 0
    assert "has ended already" in capsys.readouterr().out
    assert manage.main(["resume", "runs/a b"]) == 0
    assert "submitted: inprocess job" in capsys.readouterr().out


def test_nothing_to_manage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert manage.main(["status", "runs/x"]) == 2
    assert "runs/x: no command was started for this folder" in capsys.readouterr().err
    assert manage.main(["status"]) == 2
    assert manage.main(["list"]) == 2
    (tmp_path / "runs").mkdir()
    assert manage.main(["list"]) == 0
    assert capsys.readouterr().out == "runs: no run was started in this folder\n"


def test_a_command_here_leaves_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWOFOUR_SUBMITTED", raising=False)
    said: list[str] = []
    with submit.remembered_here(tmp_path, "prune", "python -m jobs.prune", said.append):
        assert json.loads((tmp_path / ".cluster/job.json").read_text())["kind"] == "local"
        assert manage.main(["status", str(tmp_path)]) == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / ".cluster").symlink_to(tmp_path)
    with submit.remembered_here(other, "prune", "typed", said.append):
        assert said[0].startswith("jobs.manage will not know this run")
    (other / ".cluster").unlink()
    monkeypatch.setenv("TWOFOUR_SUBMITTED", "slurm")
    with submit.remembered_here(other, "prune", "python -m jobs.prune", said.append):
        pass
    assert os.listdir(other) == []
    assert len(said) == 1


def test_scheduler_errors_are_the_users() -> None:
    from cluster.errors import ClusterError

    with pytest.raises(InputError, match="one line"), submit.cluster_mistakes():
        raise ClusterError("one\nline")
