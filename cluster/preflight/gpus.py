"""GPUs as the driver sees them: how many, which, and what it knows of their health."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.preflight.check import UNKNOWN, Check, Finding, Place, Report, odd_ones

_CALL_S = 20.0

_BASE = ("index", "uuid", "name", "driver_version", "memory.total", "memory.used")

# In calls of their own: a driver that does not know one of the fields answers none of the call.
_HEALTH = {
    "uncorrected": ("ecc.errors.uncorrected.volatile.total",),
    "throttle": ("clocks_event_reasons.active", "clocks_throttle_reasons.active"),
    "retired": ("retired_pages.pending",),
    "recovery": ("gpu_recovery_action",),
}
"""fact -> fields of --query-gpu that say it, the first one that the driver knows"""

_REMAPPED = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")

_LOST = re.compile(r"unknown error|requires reset|is lost|fallen off", re.I)

_HARDWARE_THROTTLE = {0x08: "slowed down by hardware", 0x40: "too hot", 0x80: "power brake"}

_SOFTWARE_HOT = 0x20

_XID = re.compile(r"NVRM: Xid \(PCI:[^)]*\): (\d+)")

# Those that are the card's or the driver's fault; the others may be a program's.
_CARD_XIDS = {48, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140}

_USED_SHARE = (
    0.05  # of a card's memory, above which something else is on it; a context takes 0.5 GB
)


class _NoAnswer(Exception):
    """A program is missing, fails, or prints what cannot be read; says so."""


def _ask(*words: str) -> str:
    path = shutil.which(words[0])
    if path is None:
        raise _NoAnswer(f"there is no {words[0]}")
    try:
        done = subprocess.run(  # words of ours, no shell  # noqa: S603
            [path, *words[1:]], capture_output=True, text=True, timeout=_CALL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NoAnswer(f"{words[0]}: {error}") from None
    if done.returncode != 0:
        raise _NoAnswer(f"{words[0]}: {' '.join((done.stdout or done.stderr).split())[:200]}")
    return done.stdout


def _rows(kind: str, fields: tuple[str, ...]) -> list[dict[str, str]]:
    """A query's answer: one row a GPU, field -> text."""
    said = _ask("nvidia-smi", f"--query-{kind}={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [
        [cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()
    ]
    if any(len(row) != len(fields) for row in rows):
        raise _NoAnswer(
            f"nvidia-smi: {len(fields)} fields expected: {said.splitlines()[0][:100]!r}"
        )
    return [dict(zip(fields, row, strict=True)) for row in rows]


def look(place: Place, heard: list[Any]) -> dict[str, Any]:
    """The GPUs of this node; `problem` says why nothing is known of them."""
    wanted = place.hosts.count(place.hosts[place.rank]) if place.spec.uses_gpu else 0
    if not wanted:
        return {"wanted": 0}
    try:
        gpus: list[dict[str, Any]] = [*_rows("gpu", _BASE)]
    except _NoAnswer as error:
        return {"wanted": wanted, "problem": str(error)}
    unknown = []
    for fact, fields in _HEALTH.items():
        for name in fields:
            try:
                answers = _rows("gpu", ("uuid", name))
            except _NoAnswer:
                continue
            told = {row["uuid"]: row[name] for row in answers}
            for gpu in gpus:
                gpu[fact] = told.get(gpu["uuid"], "")
            break
        else:
            unknown.append(fact)
    try:
        for row in _rows("remapped-rows", _REMAPPED):
            for gpu in gpus:
                if gpu["uuid"] == row["gpu_uuid"]:
                    gpu["remap_pending"] = row["remapped_rows.pending"]
                    gpu["remap_failure"] = row["remapped_rows.failure"]
    except _NoAnswer:
        unknown.append("remapped rows")
    return {
        "wanted": wanted, "gpus": gpus, "unknown": unknown, "xids": _xids(), "cuda": _cuda(),
    }  # fmt: skip


def _xids() -> list[int] | None:
    """Xid errors in the kernel's log since the machine started; None where it may not be read."""
    try:
        return sorted({int(number) for number in _XID.findall(_ask("dmesg"))})
    except _NoAnswer:
        return None


def _cuda() -> str | None:
    """The newest CUDA that the driver can run."""
    try:
        found = re.search(r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)", _ask("nvidia-smi"))
    except _NoAnswer:
        return None
    return found[1] if found else None


def judge(report: Report) -> Iterator[Finding]:
    """Too few, sick or unlike GPUs."""
    facts = report.by_node("gpus")
    for node, fact in facts.items():
        if problem := fact.get("problem"):
            yield Finding(
                node, f"GPUs cannot be counted: {problem}", "have its driver looked at", False
            )
            continue
        gpus = fact.get("gpus", [])
        if len(gpus) < fact["wanted"]:
            yield Finding(
                node, f"{len(gpus)} GPUs found, {fact['wanted']} wanted",
                "use another node, or set cluster.num_workers",
            )  # fmt: skip
        for gpu in gpus:
            yield from _sick(node, gpu)
        if known := sorted(_CARD_XIDS.intersection(fact.get("xids") or [])):
            yield Finding(
                node, f"the kernel's log has Xid {', '.join(map(str, known))} since the last boot, "
                "none expected", "look at its GPUs if the run fails there", False,
            )  # fmt: skip
    answered = {node: fact for node, fact in facts.items() if fact.get("gpus")}
    for what, field in (("GPUs", "name"), ("driver", "driver_version")):
        usual, others = odd_ones({n: f["gpus"][0][field] for n, f in answered.items()})
        for node in others:
            has = answered[node]["gpus"][0][field]
            yield Finding(
                node, f"{what} {has}, the others have {usual}", "all work at the speed of the "
                "slowest; use equal ones", False,
            )  # fmt: skip


def _sick(node: str, gpu: dict[str, str]) -> Iterable[Finding]:
    label = f"GPU {gpu['index']}"
    lost = [value for value in gpu.values() if _LOST.search(value)]
    if lost:
        yield Finding(node, f"{label}: nvidia-smi says {lost[0]}", "reset it or use another node")
    if _number(gpu.get("uncorrected")) > 0:
        yield Finding(
            node, f"{label}: {gpu['uncorrected']} uncorrected ECC errors since its driver was "
            "loaded, 0 expected", "reset it or use another node",
        )  # fmt: skip
    if gpu.get("remap_failure", "").lower() in ("yes", "1"):
        yield Finding(
            node, f"{label}: has no rows left to remap", "replace the card, use another node"
        )
    for fact, what in (("remap_pending", "remapped rows"), ("retired", "retired pages")):
        if gpu.get(fact, "").lower() in ("yes", "1"):
            yield Finding(node, f"{label}: {what} are pending", "reset it when it is free", False)
    action = gpu.get("recovery", "")
    if action and action.lower() not in ("none", "n/a", "[n/a]", "[not supported]"):
        yield Finding(
            node, f"{label}: its driver asks for {action!r}", "do so, or use another node"
        )
    reasons = int(_number(gpu.get("throttle")))
    if hard := [text for bit, text in _HARDWARE_THROTTLE.items() if reasons & bit]:
        yield Finding(
            node, f"{label}: {', '.join(hard)}, no throttling expected", "have its cooling and "
            "power looked at, use another node",
        )  # fmt: skip
    elif reasons & _SOFTWARE_HOT:
        yield Finding(node, f"{label}: is hot and slowed down", "look at its cooling", False)
    used, total = _number(gpu.get("memory.used")), _number(gpu.get("memory.total"))
    if total and used > _USED_SHARE * total:
        yield Finding(
            node, f"{label}: {used:,.0f} of {total:,.0f} MiB are taken before the run begins",
            "end what is left on it of earlier work", False,
        )  # fmt: skip


def _number(text: str | None) -> float:
    """The number, 0 for what is none: N/A, [Not Supported]."""
    try:
        return float(int(text, 16)) if text and text.startswith("0x") else float(text or 0)
    except ValueError:
        return 0.0


def _count(fact: dict[str, Any]) -> str:
    if not fact["wanted"] or "problem" in fact:
        return f"?/{fact['wanted']}" if fact["wanted"] else UNKNOWN
    names = sorted({gpu["name"].removeprefix("NVIDIA ") for gpu in fact["gpus"]})
    return f"{len(fact['gpus'])}/{fact['wanted']} {', '.join(names)}".strip()


def _driver(fact: dict[str, Any]) -> str:
    if not fact.get("gpus"):
        return UNKNOWN
    cuda = f" (CUDA {fact['cuda']})" if fact.get("cuda") else ""
    return f"{fact['gpus'][0]['driver_version']}{cuda}"


def _health(fact: dict[str, Any]) -> str:
    if not fact.get("gpus"):
        return UNKNOWN
    sick = [gpu for gpu in fact["gpus"] if any(found.is_bad for found in _sick("", gpu))]
    return f"{len(sick)} sick" if sick else "ok"


CHECK = Check(
    "gpus", (look,), judge, {"GPUS": _count, "DRIVER": _driver, "HEALTH": _health}
)  # fmt: skip
