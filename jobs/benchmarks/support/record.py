"""What a benchmark leaves: a dated JSON record, and the tables that it prints.

Knows nothing of what was measured. Times are in seconds, memory in bytes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jobs.runs.artifact import versions
from sparsify.files import written_whole

SCHEMA = 1


@dataclass(frozen=True)
class Target:
    """A figure that was promised, beside the one that was measured."""

    what: str
    promised: str
    """rule and limit as people read them: "<= 0.33" """
    measured: float
    is_met: bool

    @classmethod
    def at_most(cls, what: str, limit: float, measured: float) -> Target:
        """A promise that `measured` is no more than `limit`."""
        return cls(what, f"<= {limit:g}", measured, measured <= limit)

    @classmethod
    def at_least(cls, what: str, limit: float, measured: float) -> Target:
        """A promise that `measured` is no less than `limit`."""
        return cls(what, f">= {limit:g}", measured, measured >= limit)


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first column is names, the others are figures."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def render(self) -> str:
        """Aligned columns, two spaces apart: names to the left, figures to the right."""
        lines = [list(self.headings), *[list(row) for row in self.rows]]
        widths = [max(len(line[at]) for line in lines) for at in range(len(self.headings))]
        texts = [
            "  ".join(
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])


@dataclass(frozen=True)
class Chart:
    """Curves over the same places, drawn on logarithmic axes."""

    title: str
    across: str
    """name of the horizontal axis"""
    places: Sequence[float]
    curves: dict[str, Sequence[float | None]]
    """name -> a value at each place"""


@dataclass
class Outcome:
    """What a benchmark found."""

    device: str
    """cpu or cuda"""
    num_threads: int
    """CPU threads of each measured process"""
    settings: dict[str, Any]
    """sizes that decide the figures"""
    figures: dict[str, Any]
    """everything measured; plain values"""
    tables: list[Table]
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """what differs between the sides, and what the figures do not say"""
    chart: Chart | None = None
    """drawn beside the record"""
    summary: dict[str, Any] | None = None
    """printed as JSON on the last line"""
    more_charts: list[Chart] = field(default_factory=list)
    """drawn beside the first"""


def build_record(
    benchmark: str, command: str, outcome: Outcome, started_s: float
) -> dict[str, Any]:
    """The record of a benchmark as plain values.

    Args:
        benchmark: its name.
        command: what was typed.
        outcome: what it found.
        started_s: when it started, in seconds since 1970.
    """
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d", time.localtime(started_s)),
        "command": command,
        "duration_s": round(time.time() - started_s, 3),
        "device": outcome.device,
        "accelerator": accelerator_name() if outcome.device == "cuda" else None,
        "cpu": cpu_name(),
        "num_cpus": num_cpus(),
        "num_threads": outcome.num_threads,
        # More than the threads in use: something else was running too, and times are too long.
        "load_average_1min": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **versions()},
        "settings": outcome.settings,
        "figures": outcome.figures,
        "targets": [asdict(target) for target in outcome.targets],
        "notes": outcome.notes,
    }


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write the record so that the file is the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def default_name(record: dict[str, Any]) -> str:
    """Name of the record's file: its date, the benchmark and the device."""
    device = record["accelerator"] or record["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{record['date']}-bench-{record['benchmark']}-{slug}.json"


def render(outcome: Outcome) -> str:
    """The text that a benchmark prints: its tables, the targets and the notes."""
    parts = [table.render() for table in outcome.tables]
    if outcome.targets:
        rows = [
            (t.what, t.promised, f"{t.measured:.6g}", "met" if t.is_met else "missed")
            for t in outcome.targets
        ]
        parts.append(Table(("target", "promised", "measured", ""), rows).render())
    parts += [f"note: {note}" for note in outcome.notes]
    return "\n\n".join(parts)


def cpu_name() -> str:
    """Model of the CPU, as the kernel names it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerator_name() -> str:
    """Model of the first GPU."""
    import torch  # here: benchmarks that only run commands do without it

    return torch.cuda.get_device_name(0)


def gigabytes(num_bytes: float) -> str:
    """Decimal gigabytes, as in the records of other tools: 1 GB is 1e9 bytes."""
    return f"{num_bytes / 1e9:.3f} GB"
