"""The command line: what it accepts, what it says about mistakes, and how it exits."""

from __future__ import annotations

import logging
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.preempt import Interrupted
from conf.schema import Config, to_dict
from jobs import plan
from jobs.cli.command import find_command
from jobs.cli.compose import load_config
from jobs.cli.main import main
from jobs.cli.options import JOBS, cluster_names, command_presets, job_options
from sparsify.errors import InputError, MachineLostError, NonFiniteError, StoppedEarlyError

ROOT = Path(__file__).parents[3]
FROM = "run.from=runs/earlier"


class Outcome:
    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(job: str, *argv: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(find_command(job), list(argv))
        captured = capsys.readouterr()
        return Outcome(exit_.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A pipeline in place of the real one; `outcome` is what it returns or raises."""
    fake = types.SimpleNamespace(calls=[], outcome=Path("runs/done"))

    def run_pipeline(config: Config, command: str) -> Path:
        fake.calls.append((config, command))
        if isinstance(fake.outcome, BaseException):
            raise fake.outcome
        print("a line of the run")
        return fake.outcome

    def describe_plan(config: Config) -> list[str]:
        return [f"stages: {config.stages}", f"seed: {config.run.seed}"]

    monkeypatch.setattr("jobs.pipeline.run_pipeline", run_pipeline)
    monkeypatch.setattr("jobs.pipeline.describe_plan", describe_plan)
    monkeypatch.delenv("TWOFOUR_DEBUG", raising=False)
    return fake


# --- mistakes: one line each, exit code 2


@pytest.mark.parametrize(
    ("job", "argv", "parts"),
    [
        # clusters
        ("prune", ["cluster=h100x8"], ["+cluster=h100x8", "h100x32, h100x8, h200x8, local"]),
        ("prune", ["+cluster=h100x88"], ["+cluster=h100x88", "did you mean h100x8?", "local"]),
        ("prune", ["+cluster=[local,h100x8]"], ["no such cluster", "local"]),
        ("prune", ["+cluster="], ["value is missing"]),
        ("prune", ["+cluster"], ["+cluster=NAME", "h100x32, h100x8, h200x8, local"]),
        ("prune", ["+cluster.num_workers=4"], ["write cluster.num_workers=4"]),
        ("prune", ["model=lama-3.2-1b"], ["no such model", "did you mean llama-3.2-1b?"]),
        ("prune", ["recipe=fast"], ["no such recipe", "quick"]),
        # keys
        ("prune", ["prune.num_sample=3"], ["did you mean prune.num_samples", "options of prune"]),
        ("prune", ["num_samples=3"], ["prune.num_samples or quantize.num_samples", "there are"]),
        ("prune", ["patern=2:4"], ["did you mean prune.pattern?"]),
        ("prune", ["prunes.pattern=2:4"], ["did you mean prune.pattern", "prune.*"]),
        ("prune", ["zzz=1"], ["zzz: unknown option; there are: stages, run.*, model.*"]),
        ("prune", ["prune.method.x=1"], ["prune.method is a value"]),
        ("prune", ["prune=wanda"], ["prune is a group", "prune.method=..."]),
        ("prune", ["hydra.foo=1"], ["hydra.foo", "not in 'HydraConf'"]),
        ("prune", ["+foo=1"], ["foo: unknown option", "there are"]),
        ("prune", ["++prune.num_sample=3"], ["did you mean prune.num_samples"]),
        ("prune", ["run.from_=x"], ["did you mean run.from"]),
        ("pretrain", ["prune.pattern=2:4"], ["prune.pattern: is not used by jobs.pretrain"]),
        ("quantize", [FROM, "distill.num_tokens=9"], ["not used by jobs.quantize", "quantize"]),
        ("tokenize", ["run.seed=1"], ["run.seed: is not used by jobs.tokenize", "data.train"]),
        ("tokenize", ["data.isolate_documents=false"], ["not used by jobs.tokenize"]),
        ("tokenize", ["tokenize.shard_byte=1"], ["did you mean tokenize.shard_bytes"]),
        ("tokenize", ["tokenize.shard_bytes"], ["give it a value"]),
        ("tokenize", ["foo"], ["such as tokenize.out=runs/tokens"]),
        ("teach", [], ["data.train: is required", "python -m jobs.tokenize"]),
        ("teach", ["teach.num_sample=1"], ["did you mean teach.num_samples"]),
        ("teach", ["distill.temperature=2"], ["not used by jobs.teach", "teach"]),
        ("teach", ["foo"], ["such as teach.out=runs/teacher"]),
        ("teach", ["data.train=x", "model.dtype=float16"], ["needs GPUs"]),
        ("distill", [FROM, "stages=[distill]"], ["its one stage", "jobs.prune 'stages=[...]'"]),
        # syntax
        ("prune", ["foo"], ["foo: is not key=value"]),
        ("prune", ["=3"], ["=3: is not key=value"]),
        ("prune", ["prune.pattern"], ["give it a value: prune.pattern=..."]),
        ("prune", ["prune.num_samples", "=", "4"], ["without spaces"]),
        ("prune", ["prune.pattern="], ["value is missing", "leave prune.pattern out"]),
        ("prune", ["~prune.pattern"], ["cannot be removed"]),
        ("prune", ["+prune.num_samples=3"], ["write prune.num_samples=3"]),
        ("prune", ["prune..pattern=2:4"], ["not the name of an option"]),
        ("prune", ["prune@x=local"], ["prune@x"]),
        # flags
        ("prune", ["--fast"], ["--fast: unknown flag", "--print-config", "--multirun"]),
        ("prune", ["--cfg", "jobs"], ["--cfg: needs a value: job, hydra, all"]),
        ("prune", ["--config-dir"], ["--config-dir: needs a value"]),
        ("prune", ["--config-name", "mine"], ["Cannot find primary config 'mine'"]),
        ("prune", ["--cfg", "job", "-m"], ["Only one of --run, --multirun, --cfg"]),
        ("prune", ["--run.seed=3"], ["options take no dashes: run.seed=3"]),
        ("prune", ["--help", "zzz"], ["--help zzz", "no option"]),
        # types
        ("prune", ["prune.num_samples=abc"], ["prune.num_samples=abc: must be a whole number"]),
        ("prune", ["prune.num_samples=1.5"], ["must be a whole number"]),
        ("prune", ["prune.num_samples=true"], ["must be a whole number"]),
        ("prune", ["prune.num_samples=null"], ["must be a whole number"]),
        ("prune", ["prune.num_samples=1,2"], ["must be a whole number", "need --multirun"]),
        ("prune", ["prune.num_samples=(3"], ["cannot be read"]),
        ("prune", ["prune.damping=big"], ["prune.damping=big: must be a number"]),
        ("prune", ["prune.damping=true"], ["must be a number"]),
        ("prune", ["prune.damping={a:1}"], ["must be a number"]),
        ("prune", ["prune.damping=nan"], ["prune.damping=nan: must be a finite number"]),
        ("prune", ["distill.compile=yes"], ["must be true or false"]),
        ("prune", ["distill.compile=1"], ["must be true or false"]),
        ("prune", ["prune.baselines=wanda"], ["write 'prune.baselines=[wanda]'"]),
        ("prune", ["stages=prune,evaluate"], ["write 'stages=[prune,evaluate]'"]),
        ("prune", ["prune.skip=[1]"], ["must be a list"]),
        ("prune", ["prune.skip=[a(b]"], ["cannot be read", "double quotes"]),
        ("prune", ["model.path=null"], ["model.path=null: must be text"]),
        ("prune", ["model.path=${nowhere}"], ["nowhere"]),
        ("prune", ["run.seed=???"], ["must be a whole number"]),
        # rules, from the schema and from the cluster
        ("prune", ["prune.pattern=4:2"], ["prune.pattern=4:2", "1 <= N < M"]),
        ("prune", ["cluster.num_workers=0"], ["cluster.num_workers=0: must be at least 1"]),
        (
            "prune",
            ["cluster.num_workers=3"],
            ["distill.batch_size=16", "use distill.batch_size=24"],
        ),
        ("prune", ["stages=[]"], ["nothing to do"]),
        ("prune", ["stages=[evaluate]"], ["run.from: is required"]),
        ("distill", [], ["run.from: is required", "run.from=runs/"]),
        ("pretrain", ["run.from=runs/first"], ["run.from=runs/first: pretrain starts from random"]),
        ("prune", ["stages=[pretrain,prune]"], ["python -m jobs.pretrain", "model.path=RUN"]),
    ],
)
def test_mistake_is_one_line_with_the_way_out(
    run: Any, pipeline: Any, job: str, argv: list[str], parts: list[str]
) -> None:
    outcome = run(job, *argv)
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for part in parts:
        assert part in outcome.err
    assert pipeline.calls == []


@pytest.mark.parametrize(
    "word", ["a=[", "prune.skip=[a", 'run.dir="', "run.dir='a", "\x00=1", "é=1"]
)
def test_strange_words_never_show_a_traceback(run: Any, pipeline: Any, word: str) -> None:
    outcome = run("prune", word)
    assert "Traceback" not in outcome.err
    assert outcome.code in (0, 2)


# --- values arrive as they were typed


@pytest.mark.parametrize(
    ("job", "word", "found"),
    [
        ("prune", "model.path=~/m", "/h/m"), ("prune", "run.dir=~", "/h"),
        ("prune", "run.from=~/r/", "/h/r/"),
        ("prune", "model.path=./~/m", "./~/m"), ("tokenize", "tokenize.out=~/t", "/h/t"),
    ],
)  # fmt: skip
def test_a_path_may_begin_with_the_home_folder(
    job: str, word: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/h")
    key = word.partition("=")[0]
    group, leaf = key.split(".")
    assert to_dict(load_config(job, [word]))[group][leaf] == found
    with pytest.raises(InputError, match=rf"{key}=~nobody-here/x: ~nobody-here is no user's home"):
        load_config(job, [f"{key}=~nobody-here/x"])


@pytest.mark.parametrize(
    "text",
    [
        "runs/a b (2)/c", "007", "1e3", "true", "2024-01-01", "a=b", "a,b", "[x]", "{x}", "<|e|>",
        'say "hi"', "it's", "C:\\dir\\", 'tail\\"', "a~/x", "#1", "50%", "überall", "a\\\\b", "off",
    ],
)  # fmt: skip
def test_text_is_kept_as_typed(text: str) -> None:
    config = load_config("prune", [f"run.dir={text}"])
    assert isinstance(config, Config)
    assert config.run.dir == text


def test_values_of_every_type() -> None:
    config = load_config(
        "prune",
        [
            "run.from=runs/a", "run.dir=null", 'model.path="null"', "prune.num_samples=1_000",
            "distill.num_tokens=1e9", "distill.learning_rate=1e-4", "prune.damping=1",
            "distill.compile=true", "prune.skip=[*.down_proj,lm_head]",
            "prune.baselines=[]", "tracker.wandb=off", "run.seed=1", "run.seed=2",
        ],
    )  # fmt: skip
    assert isinstance(config, Config)
    assert (config.run.from_, config.run.dir, config.model.path) == ("runs/a", None, "null")
    assert config.prune.num_samples == 1000
    assert config.distill.num_tokens == 10**9
    assert type(config.distill.num_tokens) is int
    assert config.distill.learning_rate == 1e-4
    assert config.distill.compile is True
    assert config.prune.skip == ["*.down_proj", "lm_head"]
    assert config.prune.baselines == []
    assert config.tracker.wandb == "off"
    assert config.run.seed == 2  # the last one wins, so that scripts can append


def test_interpolation_reads_another_option() -> None:
    config = load_config("prune", ["distill.batch_size=${prune.num_samples}"])
    assert isinstance(config, Config)
    assert config.distill.batch_size == config.prune.num_samples


def test_plain_words_of_hydra() -> None:
    config = load_config("prune", ["++prune.num_samples=3", "~recipe", "prune={damping: 0.5}"])
    assert (config.prune.num_samples, config.prune.damping) == (3, 0.5)
    twice = load_config("prune", ["+cluster=local", "+cluster=h100x8"])
    assert twice.cluster.name == "h100x8"  # the last one wins, so that scripts can append


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOFOUR_TEST_SEED", "7")
    monkeypatch.setenv("TWOFOUR_TEST_MODEL", "/m (1)/007")
    words = ["run.seed=${oc.env:TWOFOUR_TEST_SEED}", "model.path=${oc.env:TWOFOUR_TEST_MODEL}"]
    config = load_config("prune", words)
    assert (config.run.seed, config.model.path) == (7, "/m (1)/007")
    with pytest.raises(InputError, match="TWOFOUR_TEST_NONE"):
        load_config("prune", ["model.path=${oc.env:TWOFOUR_TEST_NONE}"])


# --- Hydra's own program


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_single_run_leaves_nothing_of_hydra(run: Any, pipeline: Any, away: Path) -> None:
    handlers = list(logging.getLogger().handlers)
    assert run("prune").code == 0
    assert list(away.iterdir()) == []
    assert logging.getLogger().handlers == handlers
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_sweep_runs_every_combination_in_a_folder_of_its_own(
    run: Any, pipeline: Any, away: Path
) -> None:
    words = ["-m", "prune.method=wanda,sparsegpt", "run.seed=0,1", "prune.pattern=4:8"]
    outcome = run("prune", *words)
    assert (outcome.code, outcome.err) == (0, "")
    made = [(config.prune.method, config.run.seed) for config, _ in pipeline.calls]
    assert made == [("wanda", 0), ("wanda", 1), ("sparsegpt", 0), ("sparsegpt", 1)]
    folders = [config.run.dir for config, _ in pipeline.calls]
    assert folders[1] == "runs/sweep/prune.method-wanda_run.seed-1_prune.pattern-4-8"
    assert len(set(folders)) == 4
    assert outcome.out.count("runs/done\n") == 4
    run("prune", *words)  # the same command finds the same folders
    assert [config.run.dir for config, _ in pipeline.calls[4:]] == folders
    assert sys.argv[0] != "-m"


def test_sweep_over_presets_below_a_folder_of_ones_own(run: Any, pipeline: Any, away: Path) -> None:
    assert run("prune", "-m", "+cluster=local,h100x8", "run.dir=a").code == 0
    clusters = [(config.cluster.name, config.run.dir) for config, _ in pipeline.calls]
    assert [name for name, _ in clusters] == ["local", "h100x8"]
    assert all(folder.startswith("a/cluster-") for _, folder in clusters)
    assert run("prune", "-m", "run.seed=1", "hydra.sweep.dir=b", "hydra.sweep.subdir=c").code == 0
    assert pipeline.calls[-1][0].run.dir == "b/c"


def test_long_sweep_has_short_names(run: Any, pipeline: Any, away: Path) -> None:
    long = "x" * 300
    assert run("prune", "-m", "run.seed=1,2", f"model.path=/{long}").code == 0
    first, second = (Path(config.run.dir).name for config, _ in pipeline.calls)
    assert max(len(first), len(second)) <= 120
    assert first != second


def test_record_of_a_run_of_a_sweep_names_that_run(
    run: Any, pipeline: Any, away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def run_pipeline(config: Config, command: str) -> Path:
        seen.append(sys.argv[1:])
        return Path("runs/done")

    monkeypatch.setattr("jobs.pipeline.run_pipeline", run_pipeline)
    run("prune", "-m", "run.seed=4,5", "+cluster=h100x8", "model.path=/m (1)", f"run.dir={away}/a")
    folder = "a/run.seed-4_cluster-h100x8_model.path-m-1"
    path = "model.path=/m (1)"
    assert seen[0] == ["run.seed=4", "+cluster=h100x8", path, f"run.dir={folder}"]
    again = load_config("prune", seen[0])
    assert (again.run.seed, again.cluster.name, again.run.dir) == (4, "h100x8", folder)


def test_failed_run_of_a_sweep_hides_no_other(
    run: Any, pipeline: Any, away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_pipeline(config: Config, command: str) -> Path:
        pipeline.calls.append((config, command))
        if config.run.seed == 1:
            raise NonFiniteError("layer a: NaN")
        return Path("runs/done")

    monkeypatch.setattr("jobs.pipeline.run_pipeline", run_pipeline)
    outcome = run("prune", "-m", "run.seed=0,1,2")
    assert [config.run.seed for config, _ in pipeline.calls] == [0, 1, 2]
    assert outcome.code == 1
    assert "error: layer a: NaN\n" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: 1 of the sweep's runs failed")
    outcome = run("prune", "-m", "prune.method=wanda,wandu", "run.seed=0")
    assert outcome.code == 2
    assert "did you mean wanda?" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoppedEarlyError("a checkpoint is kept"), 75),
        (KeyboardInterrupt(), 130),
        (Interrupted(signal.SIGTERM), 75),
    ],
)
def test_sweep_that_is_asked_to_stop_stops(
    run: Any, pipeline: Any, away: Path, error: BaseException, code: int
) -> None:
    pipeline.outcome = error
    outcome = run("prune", "-m", "run.seed=0,1")
    assert (outcome.code, len(pipeline.calls)) == (code, 1)


def test_dry_sweep_leaves_nothing(run: Any, pipeline: Any, away: Path) -> None:
    outcome = run("prune", "--multirun", "run.seed=3,4", "--dry-run")
    assert (outcome.code, pipeline.calls) == (0, [])
    assert "seed: 3" in outcome.out
    assert "seed: 4" in outcome.out
    assert list(away.iterdir()) == []
    for folder in (f"{away}/a/b", ".", str(away.parent / "elsewhere" / "sweep")):
        assert run("prune", "-m", "run.seed=3,4", f"run.dir={folder}", "--dry-run").code == 0
        assert list(away.iterdir()) == []  # and this folder, which is empty, is still there
    assert list((away.parent / "elsewhere").iterdir()) == []


def test_cfg_shows_the_composed_config(run: Any, pipeline: Any, away: Path) -> None:
    shown = yaml.safe_load(run("prune", "--cfg", "job", "run.from=/a/007").out)
    assert shown == to_dict(load_config("prune", ["run.from=/a/007"]))
    assert run("prune", "-c", "job", "-p", "prune.num_samples").out == "128\n"
    reference = "run.dir=${model.path}"
    resolved = run("prune", "--cfg", "job", "--package", "run", "--resolve", reference).out
    assert "dir: embedded\n" in resolved
    assert "mode: null" in run("prune", "--cfg", "hydra").out or run("prune", "--cfg", "hydra").out
    both = yaml.safe_load(run("prune", "--cfg", "all").out)
    assert {"hydra", "prune"} <= set(both)
    assert both["hydra"]["output_subdir"] is None
    assert (pipeline.calls, list(away.iterdir())) == ([], [])


def test_info_and_hydras_help(run: Any, pipeline: Any, away: Path) -> None:
    assert "cluster/local" in run("prune", "--info", "defaults").out
    assert "BasicLauncher" in run("prune", "-i", "plugins").out
    assert run("prune", "run.seed=1", "--info").code == 0
    assert "hydra/launcher" in run("prune", "--hydra-help").out
    assert pipeline.calls == []


@pytest.fixture
def mine(away: Path) -> Path:
    """A user's own presets."""
    files = {
        "cluster/mysite": "cluster: {name: mysite, num_workers: 1}",
        "experiment/small": "defaults: [override /cluster: mysite]\nprune: {num_samples: 9}",
        "wrong/typo": "prune: {num_sample: 9}",
    }
    for name, text in files.items():
        path = away / "mine" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(f"# @package _global_\n{text}\n")
    (away / "mine" / "own.yaml").write_text("defaults: [prune, _self_]\nrun: {seed: 5}\n")
    return away / "mine"


def test_presets_of_ones_own(run: Any, pipeline: Any, mine: Path) -> None:
    for words in (
        ["--config-dir", "mine", "+cluster=mysite"],
        ["-cd=mine", "+experiment=small"],
        [f"hydra.searchpath=[file://{mine}]", "+cluster=mysite"],
        ["--config-dir", "mine", "--config-name", "own"],
    ):
        assert run("prune", *words).code == 0, words
    found = [(c.cluster.name, c.prune.num_samples, c.run.seed) for c, _ in pipeline.calls]
    assert found == [("mysite", 128, 0), ("mysite", 9, 0), ("mysite", 128, 0), ("local", 128, 5)]


def test_mistakes_in_presets_of_ones_own(run: Any, pipeline: Any, mine: Path) -> None:
    for words, part in (
        (["+cluster=mysit"], "did you mean mysite?"),
        (["+experiment=large"], "no such experiment; there are: small"),
        (["+wrong=typo"], "Key 'num_sample' not in 'PruneConfig'"),
    ):
        outcome = run("prune", "-cd", "mine", *words)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert part in outcome.err


def test_words_of_hydra_itself(run: Any, pipeline: Any, away: Path) -> None:
    assert run("prune", "+hydra.job.env_set.TWOFOUR_TEST=1", "hydra/job_logging=disabled").code == 0
    assert run("prune", "hydra/launcher=basic", "-m", "run.seed=1").code == 0
    outcome = run("prune", "hydra/launcher=nobody", "-m", "run.seed=1")
    assert outcome.code == 2
    assert "hydra/launcher/nobody" in outcome.err


@pytest.mark.parametrize(
    ("line", "choice"),
    [
        ("python -m jobs.prune prune.met", "prune.method="),
        ("python -m jobs.prune model=", "model=llama-3.1-8b"),
        (".venv/bin/python  -m  jobs.prune run.seed=1 distill.zero_s", "distill.zero_stage="),
    ],
)
def test_shell_completion(
    run: Any, monkeypatch: pytest.MonkeyPatch, line: str, choice: str
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert choice in run("prune", "-sc", "query=bash").out.split()


def test_shell_completion_is_installed_for_python_m() -> None:
    script = start("-m", "jobs.prune", "--shell-completion", "install=bash").stdout
    asked = (
        f'{script}\nCOMP_LINE="python -m jobs.prune model=llama-3.1"; '
        f"COMP_WORDS=({sys.executable} -m jobs.prune model=llama-3.1); COMP_CWORD=3; "
        '_twofour_complete; echo "${COMPREPLY[@]}"'
    )
    found = subprocess.run(
        ["bash", "-c", asked], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert found.stdout == "model=llama-3.1-8b\n", found.stderr


# --- outcomes


def test_run_prints_the_run_folder_last(run: Any, pipeline: Any) -> None:
    outcome = run("quantize", FROM, "run.seed=5")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == ["a line of the run", "runs/done"]
    ((config, command),) = pipeline.calls
    assert (command, config.stages, config.run.seed) == ("quantize", ["quantize"], 5)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("model.path=x: no such folder"), 2, "error: model.path=x: no such folder\n"),
        (MachineLostError("tfn1: lost"), 69, "error: tfn1: lost\n"),
        (NonFiniteError("layer a:\n  NaN"), 1, "error: layer a: NaN\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; run the same command again"),
        (Interrupted(signal.SIGINT), 130, "error: interrupted (SIGINT); run the same command"),
        (Interrupted(signal.SIGTERM, "in prune"), 75, "error: interrupted (SIGTERM); in prune\n"),
    ],
)
def test_failure_is_one_line(
    run: Any, pipeline: Any, error: BaseException, code: int, message: str
) -> None:
    pipeline.outcome = error
    outcome = run("prune")
    assert outcome.code == code
    assert outcome.err.startswith(message)
    assert outcome.err.count("\n") == 1


def test_unexpected_failure_shows_the_traceback_below(run: Any, pipeline: Any) -> None:
    pipeline.outcome = ZeroDivisionError("a bug")
    outcome = run("prune")
    assert outcome.code == 1
    first, second, *_ = outcome.err.splitlines()
    assert first == "error: unexpected ZeroDivisionError: a bug"
    assert second.startswith("Traceback")


def test_debug_shows_tracebacks_of_mistakes_too(
    run: Any, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOFOUR_DEBUG", "1")
    outcome = run("prune", "foo")
    assert outcome.code == 2
    assert outcome.err.startswith("error: foo")
    assert "Traceback" in outcome.err


def test_print_config_is_the_config(run: Any, pipeline: Any) -> None:
    words = ["+cluster=h100x32", "run.from=a", "distill.num_tokens=14_000_000_000"]
    outcome = run("prune", *words, "--print-config")
    assert outcome.code == 0
    assert yaml.safe_load(outcome.out) == to_dict(load_config("prune", words))
    assert pipeline.calls == []


def test_report_is_made_again_in_the_folder_of_its_run(run: Any, pipeline: Any) -> None:
    assert run("report", FROM).code == 0
    ((config, command),) = pipeline.calls
    assert (command, config.stages, config.run.redo) == ("report", ["report"], ["report"])
    assert config.run.dir == config.run.from_ == "runs/earlier"
    assert "run.from: is required" in run("report").err
    moved = run("report", FROM, "model.teacher=moved/dense")
    assert moved.code == 0, "the way out that is named where the dense model is gone"


def test_dry_run_prints_the_plan_and_runs_nothing(run: Any, pipeline: Any) -> None:
    outcome = run("distill", FROM, "run.seed=4", "--dry-run")
    assert (outcome.code, outcome.out) == (0, "stages: ['distill']\nseed: 4\n")
    assert pipeline.calls == []


def test_version_names_the_packages(run: Any) -> None:
    outcome = run("prune", "--version")
    assert outcome.code == 0
    assert re.fullmatch(r"twofour .+ \(Python 3\.\d+\.\d+, torch .+, ray .+\)\n", outcome.out)


# --- help


@pytest.mark.parametrize("job", JOBS)
def test_help_has_every_option_with_its_default_and_fits_80_columns(run: Any, job: str) -> None:
    outcome = run(job, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert outcome.out == run(job, "-h").out
    listed = re.findall(r"^  ([a-zA-Z_.0-9]+)=.*  \((?:int|float|bool|text|list)(?: or null)?\)$",
                        outcome.out, flags=re.MULTILINE)  # fmt: skip
    # What each stage may ask for is said once for all of them.
    every = [re.sub(r"^(cluster\.stages)\.\w+", r"\1.STAGE", key) for key in job_options(job)]
    assert listed == list(dict.fromkeys(every))
    followed = re.findall(r"^  [a-zA-Z_.0-9]+=.*\)\n      \S", outcome.out, flags=re.MULTILINE)
    assert len(followed) == len(listed)  # a text under every option
    assert all(f"\n  {name} " in outcome.out for name in cluster_names())


def test_help_shows_the_defaults_of_the_yaml(run: Any) -> None:
    text = run("prune", "--help").out
    for line in (
        "run.dir=null  (text or null)", "prune.pattern=2:4  (text)",
        "prune.baselines=[magnitude,wanda,sparsegpt]  (list)",
        "distill.num_tokens=1_000_000  (int)",
        "distill.learning_rate=0.001  (float)", "data.separator='<|endoftext|>'  (text)",
    ):  # fmt: skip
        assert f"\n  {line}\n" in text
    assert "sparsegpt" in text.split("METHODS")[1].split("OPTIONS")[0]
    shown = text.split("PRESETS")[1].split("METHODS")[0]
    for group, names in command_presets(find_command("prune")).items():
        assert f"{group}=" in shown
        assert all(f"\n  {name} " in shown for name in names)
    assert "\n  h100x8              one machine with 8 H100 GPUs" in shown


def test_help_of_one_stage_shows_only_what_it_uses(run: Any) -> None:
    text = run("quantize", "--help").out
    assert "quantize.scheme" in text
    assert "prune.pattern" in text
    assert "distill." not in text
    assert "prune.damping" not in text


def test_help_can_be_narrowed_and_stands_at_the_end_of_any_command(run: Any) -> None:
    narrow = run("prune", "--help", "batch_size").out
    keys = re.findall(r"^  (\S+)=", narrow, flags=re.MULTILINE)
    assert keys == [key for key in job_options("prune") if "batch_size" in key]
    assert run("prune", "prune.num_samples=abc", "--help").out == run("prune", "--help").out


def test_every_example_of_a_command_is_accepted(run: Any, pipeline: Any, away: Path) -> None:
    for job in JOBS:
        command = find_command(job)
        assert command.examples
        for example in command.examples:
            argv = shlex.split(example)
            if job in (
                "curate",
                "preflight",
                "tokenize",
                "teach",
                "plan",
            ):  # not through the pipeline
                words = plan.words_of(argv) if job == "plan" else argv
                load_config(job, [word for word in words if word != "--dry-run"])
            else:
                assert run(job, *argv).code == 0, example


# --- as a process


def start(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TWOFOUR_DEBUG"}
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from jobs.cli.main import main\n"
        "from jobs.prune import COMMAND\n"
        "try:\n    main(COMMAND, ['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'hydra', 'omegaconf', 'deepspeed', 'wandb', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    result = start("-c", script)
    assert result.stderr == "[]\n"


@pytest.mark.parametrize("job", JOBS)
def test_command_answers_help_at_once(job: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = start("-m", f"jobs.{job}", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, as the machine may be busy: 0.15 s measured, importing torch costs over 1.5.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert (result.returncode, result.stderr) == (0, "")
    assert f"python -m jobs.{job}" in result.stdout


def test_mistake_in_a_process() -> None:
    result = start("-m", "jobs.prune", "prune.num_samples=abc")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: prune.num_samples=abc: must be a whole number")
    assert result.stderr.count("\n") == 1


def test_reader_that_stops_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    script = "from jobs.prune import COMMAND, main; main(COMMAND, ['--help'])"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=180
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")
