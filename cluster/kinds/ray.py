"""A Ray that runs already: the command as a job of its Jobs API, the project shipped with it.

The job goes on when the machine that submitted it is closed. What the command reads and writes
(model, text, run.dir) has to be at the same path on the Ray's machines.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ray.job_submission import JobSubmissionClient

from cluster.errors import ClusterError
from cluster.kinds._base import DONE, FAILED, RUNNING, STOPPED, WAITING, Job, Kind, Status
from cluster.machine import way_to
from cluster.spec import ClusterSpec

PROJECT, SUBMITTED = "project", "submitted"

_PACKAGES = ("sparsify", "cluster", "conf", "jobs")

_STATES = {"PENDING": WAITING, "RUNNING": RUNNING, "STOPPED": STOPPED, "SUCCEEDED": DONE}

_STOP_WAIT_S = 600
"""what a job has for its checkpoint after it was asked to stop; Ray's own 3 s hold none"""

_AGENT_WAIT_S = 60.0

# Its client says on stderr what it packs and uploads.
for _name in (
    "dashboard.modules.dashboard_sdk",
    "dashboard.modules.job.sdk",
    "_private.runtime_env",
):
    logging.getLogger(f"ray.{_name}").setLevel(logging.WARNING)

_Answer = TypeVar("_Answer")


class RayJobs(Kind):
    """Jobs of a Ray whose address is in RAY_ADDRESS (host:port, or the dashboard's http://)."""

    name = "ray"
    follows = True

    def files(self, spec: ClusterSpec, job: Job) -> dict[str, str]:
        """The command, for a person; what is shipped is the project and the job's options."""
        shown = f"ray job submit --working-dir {shlex.quote(str(job.folder / PROJECT))} --"
        return {"submit.txt": f"{shown} {self._entrypoint(job)}\n"}

    @staticmethod
    def _entrypoint(job: Job) -> str:
        """The command with its options where the shipped folder has them."""
        words = [word.replace(str(job.folder), SUBMITTED) for word in job.command]
        return shlex.join(["python", *words])

    def submit(self, job: Job) -> str:
        """Ship the project and start the job; ID@ADDRESS."""
        address = os.environ.get("RAY_ADDRESS")
        if not address:
            raise ClusterError(
                f"cannot submit {job.name}: cluster.kind=ray needs RAY_ADDRESS, the address of a "
                "Ray that runs (host:port, or http:// and its dashboard's); set it, or choose "
                "another cluster.kind"
            )
        client, doing = _client(address), f"cannot submit {job.name}"
        number = f"twofour-{_plain(job.name)}-{uuid.uuid4().hex[:12]}"
        environment = {
            "PYTHONPATH": ".", "TWOFOUR_SUBMITTED": self.name, "OMP_NUM_THREADS": "1",
            # The command ships the project to its workers itself.
            "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
            "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S),
        }  # fmt: skip
        submit = partial(
            client.submit_job,
            entrypoint=self._entrypoint(job),
            submission_id=number,
            metadata={"job_name": job.name},
            runtime_env={"working_dir": str(_staged(job)), "env_vars": environment},
        )
        deadline_s = time.monotonic() + _AGENT_WAIT_S
        while True:
            try:
                _asked(doing, submit)
                break
            except ClusterError as error:  # a Ray that has just been started says so
                if "No available agent" not in str(error) or time.monotonic() > deadline_s:
                    raise
            time.sleep(2.0)
        return f"{number}@{address}"

    def status(self, job: Job) -> Status:
        """What the Jobs API says."""
        number, client = _reached(job)
        info: Any = _asked(f"cannot ask for job {number}", lambda: client.get_job_info(number))
        word, code = str(info.status.value), info.driver_exit_code
        state = _STATES.get(word, FAILED)
        if state == FAILED and code == os.EX_TEMPFAIL:
            state = STOPPED
        said = " ".join(str(info.message or "").split(", last available logs")[0].split())
        return Status(state, f"{word.lower()}{': ' if said else ''}{said}", code)

    def logs(self, job: Job, follow: bool = False) -> Iterator[str]:
        """What the command has printed, over the Jobs API."""
        number, client = _reached(job)
        doing = f"cannot read the log of job {number}"
        if not follow:
            yield from _asked(doing, lambda: client.get_job_logs(number)).splitlines()
            return
        parts, rest = client.tail_job_logs(number), ""

        async def following() -> str | None:
            return await anext(parts, None)

        with asyncio.Runner() as runner:  # which ends what Ctrl-C interrupts
            while (part := _asked(doing, lambda: runner.run(following()))) is not None:
                *lines, rest = (rest + part).split("\n")
                yield from lines
        if rest:
            yield rest

    def cancel(self, job: Job, now: bool = False) -> str:
        """SIGTERM to the command; Ray kills it when it has not ended in ten minutes."""
        number, client = _reached(job)
        if now:
            raise ClusterError(
                f"job {number}: Ray's Jobs API cannot end a job at once; without --now it is asked "
                f"to save and stop, and killed {_STOP_WAIT_S} s later"
            )
        _asked(f"cannot cancel job {number}", lambda: client.stop_job(number))
        return f"job {number} was asked to save and stop; Ray kills it {_STOP_WAIT_S} s later"

    def hints(self, job: Job) -> list[str]:
        """Where it is seen."""
        number, client = _reached(job)
        return [f"dashboard: {way_to(f'{client.get_address()}/#/jobs/{number}')}"]


def _plain(name: str) -> str:
    """A name as it may stand in an address."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:60]


def _staged(job: Job) -> Path:
    """The folder that is shipped: the project's packages and the job's options."""
    folder = job.folder / PROJECT
    shutil.rmtree(folder, ignore_errors=True)
    for name in _PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(Path(job.root) / name, folder / name, ignore=ignored)
    (folder / SUBMITTED).mkdir()
    for path in job.folder.glob("*.yaml"):
        shutil.copy(path, folder / SUBMITTED)
    return folder


def _reached(job: Job) -> tuple[str, JobSubmissionClient]:
    number, _, address = job.id.partition("@")
    return number, _client(address)


def _client(address: str) -> JobSubmissionClient:
    """A client of the Ray at an address; RAY_ADDRESS, which Ray would prefer, is out of the way."""
    kept = os.environ.pop("RAY_ADDRESS", None)
    try:
        return _asked(f"Ray at {address}", lambda: JobSubmissionClient(address))
    finally:
        if kept is not None:
            os.environ["RAY_ADDRESS"] = kept


def _asked(doing: str, call: Callable[[], _Answer]) -> _Answer:
    """A call of Ray's client, what goes wrong with it as one line.

    Raises:
        ClusterError: Ray is not reached, or says no.
    """
    try:
        return call()
    except (RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(f"{doing}: {said[:300]}") from None


KIND = RayJobs()
