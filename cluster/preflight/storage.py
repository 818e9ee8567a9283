"""Whether the run's folder is the same on all nodes, how fast it is, and the room there and in
shared memory.

The driver has left a file there; every node writes one of its own, then reads the driver's and
those of all others, the next node's whole: what a node wrote itself may be in its memory still.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.preflight.check import DRIVER, Check, Finding, Place, Report

_FILE_BYTES = 64 * 2**20

_PART_BYTES = 2**20

_SETTLE_S = 15.0  # NFS may remember for some seconds that a file is not there

_SHM = Path("/dev/shm")  # noqa: S108


def write(place: Place, heard: list[Any]) -> dict[str, Any]:
    """Write this node's file; MB/s, or `problem`; and the room there."""
    sign = f"{place.token}:{place.rank}".encode()
    content = sign + os.urandom(_FILE_BYTES - len(sign))
    shm = os.statvfs(_SHM)
    found: dict[str, Any] = {"shm_bytes": shm.f_blocks * shm.f_frsize}
    try:
        place.folder.mkdir(exist_ok=True)
        begun_s = time.perf_counter()
        with (place.folder / str(place.rank)).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        taken_s = time.perf_counter() - begun_s
        room = os.statvfs(place.folder)
    except OSError as error:
        return {**found, "problem": f"cannot be written ({error.strerror})"}
    return {
        **found, "write_mb_s": _FILE_BYTES / taken_s / 1e6,
        "free_bytes": room.f_bavail * room.f_frsize,
    }  # fmt: skip


def read(place: Place, heard: list[Any]) -> dict[str, Any]:
    """Read the others' files: what is not seen, and MB/s of the next node's."""
    found = dict(heard[place.rank])
    signs = {DRIVER: place.token}
    written = [r for r in place.leaders if not {"problem", "error"}.intersection(heard[r])]
    signs |= {str(rank): f"{place.token}:{rank}" for rank in written}
    deadline_s = time.monotonic() + _SETTLE_S
    unseen = [name for name, sign in signs.items() if not _is_there(place, name, sign, deadline_s)]
    found["sees_driver"] = DRIVER not in unseen
    found["unseen"] = [place.hosts[int(name)] for name in unseen if name != DRIVER]
    place_in_ring = place.leaders.index(place.rank)
    following = place.leaders[(place_in_ring + 1) % len(place.leaders)]
    if str(following) in signs and str(following) not in unseen:
        found["read_mb_s"] = _read_mb_s(place.folder / str(following))
    return found


def remove(place: Place, heard: list[Any]) -> dict[str, Any]:
    """Remove this node's file, now that all have read it."""
    (place.folder / str(place.rank)).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others' files are in it; the last one removes it
        place.folder.rmdir()
    return dict(heard[place.rank])


def _is_there(place: Place, name: str, sign: str, deadline_s: float) -> bool:
    """Whether the file is there, with what it must begin with."""
    while True:
        with contextlib.suppress(OSError):
            os.listdir(place.folder)  # has a network disk look again
            with (place.folder / name).open("rb") as file:
                if file.read(len(sign)) == sign.encode():
                    return True
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(0.5)


def _read_mb_s(path: Path) -> float:
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun_s = time.perf_counter()
        num_bytes = 0
        while part := file.read(_PART_BYTES):
            num_bytes += len(part)
    return num_bytes / (time.perf_counter() - begun_s) / 1e6


def judge(report: Report) -> Iterator[Finding]:
    """A folder that is not shared, cannot be written, is slow or full; too little shared memory."""
    limits, facts = report.limits, report.by_node("storage")
    blind = [node for node, fact in facts.items() if not fact["sees_driver"]]
    for node, fact in facts.items():
        if node in blind:
            yield Finding(
                node, "the run's folder is not the driver's: it does not have the file that was "
                "just written there", "mount the shared disk on it, or choose a shared run.dir",
            )  # fmt: skip
        elif problem := fact.get("problem"):
            yield Finding(node, f"the run's folder {problem}", "have the shared disk's mount "
                          "looked at")  # fmt: skip
        elif unseen := [other for other in fact["unseen"] if other not in blind]:
            yield Finding(
                node, f"does not see in the run's folder what {', '.join(unseen)} wrote there "
                f"{_SETTLE_S:g} s before", "have the shared disk's mount looked at",
            )  # fmt: skip
        yield from _judge_room(node, fact, report)
        for what, speed, least in (
            ("written", fact.get("write_mb_s"), limits.min_write_mb_s),
            ("read", fact.get("read_mb_s"), limits.min_read_mb_s),
        ):
            if speed is not None and speed < least:
                name = "min_write_mb_s" if what == "written" else "min_read_mb_s"
                yield Finding(
                    node, f"the run's folder is {what} at {speed:.3g} MB/s, "
                    f"cluster.preflight.{name}={least:g} expected", "checkpoints will take long; "
                    "use a faster disk", False,
                )  # fmt: skip


def _judge_room(node: str, fact: dict[str, Any], report: Report) -> Iterator[Finding]:
    limits = report.limits
    for what, size, name, least in (
        ("the run's folder has", fact.get("free_bytes"), "min_free_gb", limits.min_free_gb),
        (f"{_SHM} holds", fact["shm_bytes"], "min_shm_gb", limits.min_shm_gb),
    ):
        if size is not None and size < least * 1e9:
            fix = (
                "free some space" if name == "min_free_gb" else "make it larger (docker --shm-size)"
            )
            yield Finding(
                node, f"{what} {size / 1e9:.3g} GB, cluster.preflight.{name}={least:g} expected",
                fix,
            )  # fmt: skip


def _speeds(fact: dict[str, Any]) -> str:
    speeds = (fact.get("write_mb_s"), fact.get("read_mb_s"))
    return "/".join("-" if speed is None else f"{speed:,.0f}" for speed in speeds) + " MB/s"


CHECK = Check(
    "storage", (write, read, remove), judge,
    {
        "WRITE/READ": _speeds,
        "FREE": lambda fact: f"{fact['free_bytes'] / 1e9:,.0f} GB" if "free_bytes" in fact else "-",
        "SHM": lambda fact: f"{fact['shm_bytes'] / 1e9:.3g} GB",
    },
)  # fmt: skip
