"""Slurm: a batch script that brings up one Ray for the job and runs the command inside it.

The script is a header and quoted values, made here, and `slurm.sh`, which is the same for all jobs.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ClusterError
from cluster.kinds._base import (
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    Job,
    Kind,
    Status,
    call,
)
from cluster.spec import ClusterSpec

SCRIPT = "job.sh"

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

    def files(self, spec: ClusterSpec, job: Job) -> dict[str, str]:
        """The batch script."""
        try:
            workers = spec.workers_per_node
        except ValueError as error:
            raise ClusterError(str(error)) from None
        body = (Path(__file__).parent / "slurm.sh").read_text(encoding="utf-8")
        return {SCRIPT: _header(spec, job, workers) + _values(spec, job, workers) + "\n" + body}

    def submit(self, job: Job) -> str:
        """`sbatch`; the job's number."""
        doing = f"cannot submit {job.name}"
        if shutil.which("sbatch") is None:
            raise ClusterError(
                f"{doing}: cluster.kind=slurm needs sbatch, which is not on PATH; log in to a "
                "login node of the cluster, or choose another cluster.kind"
            )
        script = str(job.folder / SCRIPT)
        try:
            # More nodes, cores or GPUs than there are would wait in the queue for ever.
            call(["sbatch", "--test-only", script], doing)
            # The environment goes along (PATH, HF_HOME, a tracker's key), never into a file.
            said = call(["sbatch", "--parsable", "--export=ALL", script], doing)
        except ClusterError as error:
            raise ClusterError(f"{error}{_what_there_is()}") from None
        return said.split(";")[0]

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
            return Status(STOPPED, "Slurm has forgotten the job; its log says how it ended")
        code = int(fields.get("ExitCode", "0:0").split(":")[0])
        state = _STATES.get(word, FAILED)
        if state == FAILED and code == _STOPPED_CODE:
            state = STOPPED
        detail = word.lower()
        if state == WAITING:
            detail += f": {fields.get('Reason', 'None')}, starts {fields.get('StartTime')}"
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
        port = 20001 + 10 * (int(job.id) % 1000)
        return [
            f"follow:    tail -F {shlex.quote(str(job.folder / f'{job.id}.log'))}",
            f"dashboard: ssh -N -L 8265:localhost:{port} $(squeue -h -j {job.id} -o %B), then "
            "http://localhost:8265 (once it runs; the log has the line with its token's file)",
        ]


def _header(spec: ClusterSpec, job: Job, workers: int) -> str:
    """The lines that sbatch reads."""
    slurm = spec.slurm
    folder = str(job.folder)
    if not folder.isprintable() or set(folder) & set("%\\"):
        raise ClusterError(
            f"run.dir={job.run_dir!r}: Slurm cannot write its log below a path with %, \\ or line "
            "breaks in it; choose another run.dir"
        )
    gpus = workers * int(spec.gpus_per_worker)
    lines = [
        ("job-name", re.sub(r"[^\w.+-]", "-", job.name, flags=re.ASCII)),
        ("nodes", spec.num_nodes), ("ntasks-per-node", 1),
        ("cpus-per-task", _cpus(spec, workers)),
        ("gpus-per-node", f"{slurm.gpu_type}:{gpus}" if slurm.gpu_type else gpus or None),
        ("mem", slurm.memory),
        ("account", slurm.account), ("partition", slurm.partition), ("qos", slurm.qos),
        ("time", slurm.time), ("constraint", slurm.constraint), ("exclude", slurm.exclude),
        ("exclusive", "" if slurm.exclusive else None),
        ("signal", f"B:USR1@{slurm.signal_lead_s}"),
        ("requeue" if slurm.max_requeues else "no-requeue", ""),
        ("open-mode", "append"), ("chdir", folder), ("output", f"{folder}/%j.log"),
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


def _values(spec: ClusterSpec, job: Job, workers: int) -> str:
    """The values that `slurm.sh` works with, quoted for bash."""
    slurm = spec.slurm
    python, bin_folder = sys.executable, str(Path(sys.executable).parent)
    inside: list[str] = [] if slurm.exclusive else list(_PRIVATE)
    if slurm.container is not None:
        python, bin_folder = "python3", ""
        binds = dict.fromkeys([job.root, job.directory, job.run_dir])
        binds_words = [word for path in binds for word in ("--bind", path)]
        inside += ["apptainer", "exec", "--nv", *binds_words, slurm.container]
    values: dict[str, str | int | list[str]] = {
        "root": job.root,
        "directory": job.directory,
        "folder": str(job.folder),
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
    }
    lines = [f"{name}={_quoted(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _quoted(value: str | int | list[str]) -> str:
    if isinstance(value, list):
        return f"({' '.join(shlex.quote(word) for word in value)})"
    return shlex.quote(str(value))


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
