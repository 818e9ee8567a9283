"""From a checked config to a job that runs elsewhere: its folder, resolved options and command."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster import launch
from cluster.errors import ClusterError
from cluster.kinds import get_kind, kind_of
from cluster.kinds._base import FAILED, STOPPED, Job
from cluster.kinds.local import leave_code, process_id
from cluster.preempt import Interrupted
from cluster.spec import ClusterSpec
from cluster.stages import StagedClusterSpec
from conf.schema import PlanJobConfig, default_run_dir, to_dict
from jobs.cli.command import Command
from sparsify.errors import InputError, StoppedEarlyError, TwofourError

ROOT = Path(__file__).resolve().parents[2]

_OPTIONS = "config"  # the job's file of options, without .yaml


def runs_elsewhere(config: Any) -> bool:
    """Whether the config's work is to be submitted instead of done by this process."""
    spec: ClusterSpec | None = getattr(config, "cluster", None)
    is_plan = isinstance(config, PlanJobConfig)  # of a run that may be elsewhere, made here
    return spec is not None and spec.kind != "local" and not is_plan


def has_files_here(config: Any) -> bool:
    """Whether the job reads its models and texts where this command would: in a shared folder."""
    return bool(config.cluster.kind == "slurm" and config.cluster.slurm.container is None)


def describe(command: Command, config: Any, words: Sequence[str]) -> str:
    """All that would be submitted, as text; touches nothing."""
    job = job_of(command, config, words)
    with cluster_mistakes():
        files = launch.rendered(allocation(config), job)
    files = {**files, **job_files(command, config, job)}
    return "\n".join(f"--- {job.folder / name}\n{text}" for name, text in files.items())


def submit(command: Command, config: Any, words: Sequence[str]) -> str:
    """Submit the command; what to tell its user.

    Raises:
        InputError: it is refused, or its run has a job already.
        StoppedEarlyError, TwofourError: of a kind that follows its jobs: how this one ended.
    """
    job = job_of(command, config, words)
    with cluster_mistakes():
        job = launch.submit(allocation(config), job, job_files(command, config, job))
        kind = kind_of(job)
        if not kind.follows:
            return told(job)
        print(told(job), flush=True)
        status = kind.attach(job, lambda line: print(line, flush=True), ask)
    if status.state == STOPPED:
        raise StoppedEarlyError(f"job {job.id} has stopped: {status.detail}")
    if status.state == FAILED:
        raise TwofourError(f"job {job.id} has failed: {status.detail}")
    return job.run_dir


def ask(question: str) -> bool:
    """Whether the person at the terminal says yes; nobody there, or Ctrl-C, is no."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def told(job: Job) -> str:
    """What to tell somebody who has just submitted a job."""
    run_dir = shlex.quote(job.run_dir)
    return "\n".join([
        f"submitted: {job.kind} job {job.id} for {job.run_dir}",
        *(f"  {line}" for line in kind_of(job).hints(job)),
        f"  status:    python -m jobs.manage status {run_dir}",
        f"  cancel:    python -m jobs.manage cancel {run_dir}",
    ])  # fmt: skip


@contextlib.contextmanager
def remembered_here(
    run_dir: Path, job: str, typed: str, warn: Callable[[str], None]
) -> Iterator[None]:
    """Record that this process works on a run, and how that ends, unless it is that of a job with
    its own record.

    Args:
        run_dir: the run's folder.
        job: name of the command's module below `jobs`.
        typed: the command line, for a person.
        warn: told why there is no record: a run may be in a folder of somebody else.
    """
    if "TWOFOUR_SUBMITTED" in os.environ:
        yield
        return
    known = Job(
        kind="local", name=run_dir.name, command=("-m", f"jobs.{job}", *sys.argv[1:]), typed=typed,
        root=str(ROOT), directory=str(Path.cwd()), run_dir=str(run_dir),
        id=process_id(os.getpid(), at_terminal=True),
    )  # fmt: skip
    try:
        launch.remember(known)
    except ClusterError as error:
        warn(f"jobs.manage will not know this run: {error}")
        yield
        return
    leave_code(known, None)
    try:
        yield
    except BaseException as error:
        leave_code(known, _exit_code(error))
        raise
    leave_code(known, 0)


def _exit_code(error: BaseException) -> int:
    """That of a command that ends with the error; see jobs/cli/main.py."""
    if isinstance(error, Interrupted):
        return error.exit_code
    if isinstance(error, StoppedEarlyError):
        return os.EX_TEMPFAIL
    return 130 if isinstance(error, KeyboardInterrupt) else 1 + isinstance(error, InputError)


@contextlib.contextmanager
def cluster_mistakes() -> Iterator[None]:
    """What a scheduler refuses, as the user's mistake."""
    try:
        yield
    except ClusterError as error:
        raise InputError(" ".join(str(error).split())) from None


def job_of(command: Command, config: Any, words: Sequence[str]) -> Job:
    """The job of a command with these words, without an id."""
    told_out: Any = config
    for name in command.out.split("."):
        told_out = getattr(told_out, name)
    run_dir = Path(told_out or default_run_dir(config)).absolute()
    typed = shlex.join(["python", "-m", f"jobs.{command.name}", *words])
    folder = run_dir / ".cluster"
    return Job(
        kind=config.cluster.kind, name=run_dir.name,
        command=("-m", f"jobs.{command.name}", f"--config-dir={folder}", "--config-name", _OPTIONS),
        typed=typed, root=str(ROOT), directory=str(Path.cwd()), run_dir=str(run_dir),
        parts=parts_of(config),
    )  # fmt: skip


def job_files(command: Command, config: Any, job: Job) -> dict[str, str]:
    """Name -> text of what the job's command reads: its options."""
    return {f"{_OPTIONS}.yaml": _options_file(command, config, job)}


def parts_of(config: Any) -> tuple[tuple[str, ...], ...]:
    """Stages of each of the jobs that a command becomes; () where it becomes one."""
    spec = config.cluster
    if not isinstance(spec, StagedClusterSpec) or not get_kind(spec.kind).chains:
        return ()
    parts = spec.parts(_to_do(config))
    return tuple(parts) if len(parts) > 1 else ()


def _to_do(config: Any) -> list[str]:
    stages: list[str] = config.stages
    return stages if config.run.until is None else stages[: stages.index(config.run.until) + 1]


def allocation(config: Any) -> ClusterSpec:
    """What is asked of a scheduler: enough for the largest stage, or for each part its own."""
    spec: ClusterSpec = config.cluster
    if not isinstance(spec, StagedClusterSpec) or parts_of(config):
        return spec
    return spec.largest(_to_do(config))


class _Dumper(yaml.SafeDumper):
    """YAML whose texts are in quotes unless they can be nothing else: 1e5 and on stay texts."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_word = re.fullmatch(r"[a-z_]+\d?", text) and not re.fullmatch(
        "y|n|yes|no|on|off|true|false|null", text
    )
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_word else '"')


_Dumper.add_representer(str, _text)


def _options_file(command: Command, config: Any, job: Job) -> str:
    """Every option as it is now, for Hydra: a preset changed later changes no job in a queue."""
    plain = to_dict(config)
    plain["cluster"]["kind"] = "local"  # there the command itself does the work
    *groups, leaf = command.out.split(".")
    inner = plain
    for name in groups:
        inner = inner[name]
    inner[leaf] = job.run_dir
    # Twice, since what Hydra has composed is read once more, into the dataclasses.
    plain = _without_interpolations(_without_interpolations(plain))
    plain = {"defaults": ["options", "_self_"], **plain}
    text = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    if "\n" in job.typed or not job.typed.isprintable():
        return text
    return f"# {job.typed}\n{text}"


def _without_interpolations(node: Any) -> Any:
    """Resolved values, with what would look like ${...} marked as text."""
    if isinstance(node, dict):
        return {key: _without_interpolations(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_interpolations(value) for value in node]
    if isinstance(node, str):
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", node)
    return node
