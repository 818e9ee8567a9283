"""Slurm: a batch script that brings up one Ray for the job and runs the command inside it.

The script is a header and quoted values, made here, and `slurm.sh`, which is the same for all jobs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.errors import ClusterError
from cluster.kinds._base import (
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    Array,
    Job,
    Kind,
    Status,
    call,
)
from cluster.spec import ClusterSpec

_STATES = {
    "PENDING": WAITING, "CONFIGURING": WAITING, "REQUEUED": WAITING, "SUSPENDED": WAITING,
    "REQUEUE_HOLD": WAITING, "REQUEUE_FED": WAITING, "SPECIAL_EXIT": WAITING,
    "RUNNING": RUNNING, "COMPLETING": RUNNING, "STAGE_OUT": RUNNING, "RESIZING": RUNNING,
    "SIGNALING": RUNNING, "STOPPED": RUNNING, "COMPLETED": DONE, "CANCELLED": STOPPED,
}  # fmt: skip
"""Slurm's word -> ours; every other is a failure"""

_STOPPED_CODE = 75

# Hidden processes: another Ray of the node is neither found nor stopped by this job's.
_PRIVATE = ("unshare", "--user", "--map-current-user", "--pid", "--fork", "--kill-child",
            "--mount-proc")  # fmt: skip


class Slurm(Kind):
    """Jobs of Slurm, through its own commands."""

    name = "slurm"
    chains = True

    def files(self, spec: ClusterSpec, job: Job) -> dict[str, str]:
        """The batch script."""
        return {job.script: _header(spec, job) + _lines(_values(spec, job)) + _body()}

    def arrays(self, sweep: Job, runs: Sequence[tuple[ClusterSpec, Job]]) -> list[Array]:
        """One for each set of runs whose scripts differ in nothing but the run's folder.

        None where a run is several jobs itself, one after another.
        """
        if any(job.parts for _, job in runs):
            return []
        groups: dict[str, list[int]] = {}
        for number, (spec, job) in enumerate(runs):
            same = _header(spec, sweep, "") + _lines(_values(spec, job, sweep), job.run_dir)
            groups.setdefault(same, []).append(number)
        found: list[Array] = []
        for numbers in groups.values():
            path = sweep.folder / (f"job-{len(found)}.sh" if found else sweep.script)
            spec, first = runs[numbers[0]]
            values = _values(spec, first, sweep)
            jobs = [
                dataclasses.replace(runs[number][1], array=str(path), task=str(number))
                for number in numbers
            ]
            script = [
                _header(spec, sweep, _ranges(numbers)), _elements(jobs),
                _lines(values, first.run_dir), _body(),
            ]  # fmt: skip
            found.append(Array("".join(script), first.script, tuple(jobs)))
        return found

    def submit(self, job: Job) -> str:
        """`sbatch`; the job's number."""
        if job.array:
            return self.submit_array([job])[0]
        # A job whose turn can never come ends instead of waiting for ever.
        words = [f"--dependency=afterok:{job.after}", "--kill-on-invalid-dep=yes"]
        script = str(job.folder / job.script)
        return _sbatch([script], f"cannot submit {job.name}", words if job.after else [])

    def submit_array(self, jobs: Sequence[Job]) -> list[str]:
        """`sbatch --array`, as many at once as the script says; NUMBER_TASK of each."""
        path = Path(jobs[0].array)
        doing = f"cannot submit {len(jobs)} runs of the sweep {path.parents[1]}"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ClusterError(f"{doing}: {path}: {error.strerror}") from None
        limit = re.search(r"(?m)^#SBATCH --array=[\d,-]+(%\d+)$", text)
        numbers = _ranges([int(job.task) for job in jobs]) + (limit[1] if limit else "")
        number = _sbatch([f"--array={numbers}", str(path)], doing)
        return [f"{number}_{job.task}" for job in jobs]

    def status(self, job: Job) -> Status:
        """What `scontrol` says."""
        shown = self._shown(job)
        fields: dict[str, str] = {}
        for text in shown.split():  # what a person may have named comes after what is read here
            key, equals, value = text.partition("=")
            if equals:
                fields.setdefault(key, value)
        word = fields.get("JobState")
        if word is None:
            return _ended(job)
        code = int(fields.get("ExitCode", "0:0").split(":")[0])
        state = _STATES.get(word, FAILED)
        if state == FAILED and code == _STOPPED_CODE:
            state = STOPPED
        detail = word.lower()
        if state == WAITING:
            detail += f": {fields.get('Reason', 'None')}, starts {fields.get('StartTime')}"
            if (others := fields.get("Dependency", "(null)")) != "(null)":
                detail = f"{word.lower()}: waits for {others}"
        elif state == RUNNING:
            detail += f" on {fields.get('NodeList')} for {fields.get('RunTime')}"
        elif fields.get("Reason") == "JobLaunchFailure":
            detail = (
                f"{fields.get('BatchHost')} could not start it: {job.folder} must be on a disk "
                "that all nodes see"
            )
        elif code:
            detail = f"exit code {code}"
        return Status(state, detail, None if state in (WAITING, RUNNING) else code)

    @staticmethod
    def _shown(job: Job) -> str:
        """Slurm's line on the job; '' where it has forgotten it, some minutes after its end."""
        try:
            words = ["scontrol", "show", "job", "--oneliner", job.id]
            return call(words, f"cannot ask for job {job.id}")
        except ClusterError as error:
            if "Invalid job id" in str(error):
                return ""
            raise

    def logs(self, job: Job, follow: bool = False) -> Iterator[str]:
        """Lines of the job's output, all its attempts in one file."""
        yield from self._file_lines(job.folder / f"{job.id}.log", job, follow)

    def cancel(self, job: Job, now: bool = False) -> str:
        """A signal to the batch script, which has the command save and stop; or `scancel`."""
        doing = f"cannot cancel job {job.id}"
        if now or self.status(job).state != RUNNING:
            call(["scancel", job.id], doing)
            return f"job {job.id} is cancelled"
        # Not TERM, of which Slurm writes into the log that the job is cancelled.
        call(["scancel", "--batch", "--signal=USR2", job.id], doing)
        return (
            f"job {job.id} was asked to save and stop; `python -m jobs.manage cancel "
            f"{job.run_dir} --now` ends it without"
        )

    def hints(self, job: Job) -> list[str]:
        """Commands of Slurm's and ours."""
        follow = f"follow:    tail -F {shlex.quote(str(job.folder / f'{job.id}.log'))}"
        if not job.id.isdecimal():  # of an array: its own number is not known before it starts
            return [follow, "dashboard: once it runs, its log has the line that reaches it"]
        port = 20001 + 10 * (int(job.id) % 1000)
        return [
            follow,
            f"dashboard: ssh -N -L 8265:localhost:{port} $(squeue -h -j {job.id} -o %B), then "
            "http://localhost:8265 (once it runs; the log has the line with its token's file)",
        ]


def _sbatch(words: list[str], doing: str, after: Sequence[str] = ()) -> str:
    """Hand a script over, to be run `after` other jobs where options say so; the job's number."""
    if shutil.which("sbatch") is None:
        raise ClusterError(
            f"{doing}: cluster.kind=slurm needs sbatch, which is not on PATH; log in to a "
            "login node of the cluster, or choose another cluster.kind"
        )
    try:
        # More nodes, cores or GPUs than there are would wait in the queue for ever.
        call(["sbatch", "--test-only", *words], doing)
        # The environment goes along (PATH, HF_HOME, a tracker's key), never into a file.
        said = call(["sbatch", "--parsable", "--export=ALL", *after, *words], doing)
    except ClusterError as error:
        raise ClusterError(f"{error}{_what_there_is()}") from None
    return said.split(";")[0]


def _ended(job: Job) -> Status:
    """Where a job is that Slurm has forgotten, by the exit code that its script has left."""
    try:
        code = int((job.folder / f"{job.id}.exit").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Status(STOPPED, "Slurm has forgotten the job; its log says how it ended")
    state = {0: DONE, _STOPPED_CODE: STOPPED}.get(code, FAILED)
    return Status(state, f"exit code {code}", code)


def _header(spec: ClusterSpec, job: Job, tasks: str | None = None) -> str:
    """The lines that sbatch reads; with `tasks`, those of an array."""
    slurm, workers = spec.slurm, _workers(spec)
    folder = str(job.folder)
    if not folder.isprintable() or set(folder) & set("%\\"):
        raise ClusterError(
            f"run.dir={job.run_dir!r}: Slurm cannot write its log below a path with %, \\ or line "
            "breaks in it; choose another run.dir"
        )
    gpus = workers * int(spec.gpus_per_worker)
    limit = f"%{spec.sweep_jobs}" if spec.sweep_jobs is not None else ""
    output = f"{folder}/%j.log" if tasks is None else f"{folder}/%a/%A_%a.log"
    lines = [
        ("array", None if tasks is None else tasks + limit),
        ("job-name", re.sub(r"[^\w.+-]", "-", job.name, flags=re.ASCII)),
        ("nodes", spec.num_nodes), ("ntasks-per-node", 1),
        ("cpus-per-task", _cpus(spec, workers)),
        ("gpus-per-node", f"{slurm.gpu_type}:{gpus}" if slurm.gpu_type and gpus else gpus or None),
        ("mem", slurm.memory),
        ("account", slurm.account), ("partition", slurm.partition), ("qos", slurm.qos),
        ("time", slurm.time), ("constraint", slurm.constraint), ("exclude", slurm.exclude),
        ("exclusive", "" if slurm.exclusive else None),
        ("signal", f"B:USR1@{slurm.signal_lead_s}"),
        ("requeue" if slurm.max_requeues else "no-requeue", ""),
        ("open-mode", "append"), ("chdir", folder), ("output", output),
    ]  # fmt: skip
    shown = [_option(name, str(value)) for name, value in lines if value is not None]
    for text in slurm.extra:
        name, equals, value = text.removeprefix("--").partition("=")
        shown.append(_option(name, value, bool(equals)))
    said = f"# {_printable(job.typed)}"
    return "\n".join(["#!/bin/bash", said, *(f"#SBATCH {line}" for line in shown), ""])


def _option(name: str, value: str, has_value: bool | None = None) -> str:
    """An option in sbatch's own way of quoting, which has backslashes inside double quotes."""
    if not (bool(value) if has_value is None else has_value):
        return f"--{name}"
    plain = shlex.quote(value) == value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f"--{name}={value}" if plain else f'--{name}="{escaped}"'


def _values(
    spec: ClusterSpec, job: Job, sweep: Job | None = None
) -> dict[str, str | int | list[str]]:
    """The values that `slurm.sh` works with."""
    slurm, workers = spec.slurm, _workers(spec)
    python, bin_folder = sys.executable, str(Path(sys.executable).parent)
    inside: list[str] = [] if slurm.exclusive else list(_PRIVATE)
    if slurm.container is not None:
        python, bin_folder = "python3", ""
        binds = dict.fromkeys([job.root, job.directory, job.run_dir])
        if sweep is not None:
            binds[sweep.run_dir] = None
        binds_words = [word for path in binds for word in ("--bind", path)]
        inside += ["apptainer", "exec", "--nv", *binds_words, slurm.container]
    return {
        "root": job.root,
        "directory": job.directory,
        "folder": str(job.folder),
        "script": job.script,
        "command": [python, *job.command],
        "bin": bin_folder,
        "modules": slurm.modules,
        "setup": slurm.setup or "",
        "container": slurm.container or "",
        "inside": inside,
        "interface": slurm.interface or "",
        "nodes": spec.num_nodes,
        "cpus": _cpus(spec, workers),
        "gpus": workers * int(spec.gpus_per_worker),
        "start_timeout_s": math.ceil(spec.start_timeout_s),
        "max_requeues": slurm.max_requeues,
        "max_replacements": slurm.max_replacements,
        "preflight": "no" if spec.preflight.when == "never" else "yes",
    }


def _lines(values: dict[str, str | int | list[str]], run_dir: str = "") -> str:
    """The values quoted for bash; what names `run_dir` does so by the variable of that name."""

    def quoted(text: str) -> str:
        parts = text.split(run_dir) if run_dir else [text]
        return '"$run_dir"'.join(
            shlex.quote(part) if part or len(parts) == 1 else "" for part in parts
        )

    lines = [
        f"{name}=({' '.join(quoted(word) for word in value)})" if isinstance(value, list)
        else f"{name}={quoted(str(value))}"
        for name, value in values.items()
    ]  # fmt: skip
    return "\n".join(lines) + "\n\n"


def _elements(jobs: Sequence[Job]) -> str:
    """The folders of an array's runs; Slurm starts the script once for each, with its number."""
    lines = [f"    [{job.task}]={shlex.quote(job.run_dir)}" for job in jobs]
    number = "${SLURM_ARRAY_TASK_ID:?is set by Slurm alone: submit this file with sbatch}"
    return "\n".join(["run_dirs=(", *lines, ")", f"run_dir=${{run_dirs[{number}]:?}}", ""])


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as Slurm takes them: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _body() -> str:
    return (Path(__file__).parent / "slurm.sh").read_text(encoding="utf-8")


def _workers(spec: ClusterSpec) -> int:
    """Workers of each node."""
    try:
        return spec.workers_per_node
    except ValueError as error:
        raise ClusterError(str(error)) from None


def _cpus(spec: ClusterSpec, workers: int) -> int:
    """Cores of each node: the workers', and one for the driver and Ray's own processes."""
    return math.ceil(workers * spec.cpus_per_worker) or 1


def _printable(text: str) -> str:
    """Text for a comment or a name: on one line."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def _what_there_is() -> str:
    """Partitions and nodes of this Slurm, for somebody whose job was refused; '' if unknown."""
    try:
        said = call(["sinfo", "--noheader", "--format=%R: %D nodes, %c cores, %G"], "sinfo")
    except ClusterError:
        return ""
    return f"; this Slurm has {'; '.join(said.replace('(null)', 'no GPUs').splitlines())}"


KIND = Slurm()
