"""What the command line knows of a command."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """One `python -m jobs.<name>`: the `COMMAND` of its module, run by `jobs.cli.main.main`."""

    name: str
    """of the module, and of the YAML file in conf/"""
    config: type
    """dataclass of its options"""
    run: Callable[[Any], Path | str]
    """does the work of a checked config; returns what to print last"""
    plan: Callable[[Any], list[str]]
    """what `run` would do, in lines for a person; touches nothing"""
    summary: str
    """for help: the first paragraph, such as the docstring of its module"""
    examples: tuple[str, ...]
    """words of command lines that people may want to copy; the first sets one option"""
    uses: tuple[str, ...] = ()
    """groups and single options that it takes; () takes all of `config`"""
    needs: str = ""
    """what every command line must give, for the line of usage"""
    compare: Callable[[Path], None] | None = None
    """shows what the runs of a sweep's folder have come to; None: they have nothing to compare"""
    out: str = "run.dir"
    """option that names the folder it writes: every run of a sweep gets one of its own"""


def find_command(name: str) -> Command:
    """The command of `jobs/<name>.py`."""
    return importlib.import_module(f"jobs.{name}").COMMAND
