"""A command as several jobs, each of which waits until the one before has ended well.

For stages that ask for different resources. Every job is the same command up to the last stage of
its part; what is finished is reused, so that none does another's work again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from cluster.kinds._base import DONE, FAILED, RUNNING, STOPPED, WAITING, Job, Kind, Status
from cluster.spec import ClusterSpec
from cluster.stages import StagedClusterSpec


class Chain(Kind):
    """Jobs of another kind, one for each of the job's parts; ids are kept with commas between."""

    def __init__(self, kind: Kind) -> None:
        self.name = kind.name
        self._kind = kind

    def jobs(self, job: Job) -> list[Job]:
        """One for each part, in the order in which they run."""
        ids = job.id.split(",") if job.id else [""] * len(job.parts)
        found = []
        for number, (stages, one) in enumerate(zip(job.parts, ids, strict=True), 1):
            is_last = number == len(job.parts)
            after = f"; it starts when job{number - 1}.sh has ended well" if number > 1 else ""
            found.append(replace(
                job, id=one, parts=(), script=f"job{number}.sh",
                name=f"{job.name}-{'+'.join(stages)}",
                command=job.command if is_last else (*job.command, f"run.until={stages[-1]}"),
                typed=f"{job.typed}  # part {number} of {len(job.parts)}: "
                      f"{', '.join(stages)}{after}",
            ))  # fmt: skip
        return found

    def files(self, spec: ClusterSpec, job: Job) -> dict[str, str]:
        """Those of every part, made for what its stages ask for."""
        assert isinstance(spec, StagedClusterSpec), "a command with stages"
        found: dict[str, str] = {}
        for stages, one in zip(job.parts, self.jobs(job), strict=True):
            found |= self._kind.files(spec.largest(stages), one)
        return found

    def submit(self, job: Job) -> str:
        """Every part that has no id yet, each after the one before; all or none."""
        new: list[Job] = []
        ids = []
        try:
            for one in self.jobs(job):
                if not one.id:
                    after = new[-1].id if new else ""
                    one = replace(one, id=self._kind.submit(replace(one, after=after)))
                    new.append(one)
                ids.append(one.id)
        except BaseException:
            for one in reversed(new):
                self._kind.cancel(one, now=True)
            raise
        return ",".join(ids)

    def left(self, job: Job, is_made: Callable[[str], bool]) -> Job:
        """The job without the ids of what is to be submitted again: at least its last part.

        Args:
            job: that has ended.
            is_made: whether a stage has been finished by it.
        """
        ids = job.id.split(",")
        states = [status.state for status in self.statuses(job)]
        for number, stages in enumerate(job.parts[:-1]):
            if states[number] != DONE and not all(is_made(stage) for stage in stages):
                break
        else:
            number = len(ids) - 1
        return replace(job, id=",".join([*ids[:number], *[""] * (len(ids) - number)]))

    def statuses(self, job: Job) -> list[Status]:
        """Where each part is; one that a later one has started after has ended well."""
        found: list[Status] = []
        has_started = False
        for one in reversed(self.jobs(job)):
            found.append(Status(DONE, "", 0) if has_started else self._kind.status(one))
            has_started = has_started or found[-1].state in (RUNNING, DONE, FAILED)
        return found[::-1]

    def status(self, job: Job) -> Status:
        """Of all parts together: of one that may still do something, else how the last ended."""
        found = self.statuses(job)
        details = [
            f"{', '.join(stages)}: {one.state}{f' ({one.detail})' * bool(one.detail)}"
            for stages, one in zip(job.parts, found, strict=True)
        ]
        by_state = {one.state: one for one in reversed(found)}
        order = (RUNNING, WAITING, FAILED, STOPPED, DONE)
        state = next(state for state in order if state in by_state)
        return Status(state, "; ".join(details), by_state[state].exit_code)

    def logs(self, job: Job, follow: bool = False) -> Iterator[str]:
        """What the parts have printed, one after another."""
        for stages, one in zip(job.parts, self.jobs(job), strict=True):
            yield f"--- job {one.id}: {', '.join(stages)}"
            yield from self._kind.logs(one, follow)

    def cancel(self, job: Job, now: bool = False) -> str:
        """The last part first, so that none starts while others are cancelled."""
        said = [
            self._kind.cancel(one, now)
            for one, status in reversed(list(zip(self.jobs(job), self.statuses(job), strict=True)))
            if status.is_alive
        ]
        return "; ".join(said) or f"job {job.id} has ended"

    def hints(self, job: Job) -> list[str]:
        """Which job does what, and how to reach each."""
        found, before = [], ""
        for stages, one in zip(job.parts, self.jobs(job), strict=True):
            found.append(f"job {one.id}: {', '.join(stages)}{before}")
            found += [f"  {line}" for line in self._kind.hints(one)]
            before = f", after job {one.id}"
        return found
