"""What the command line knows of a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """One `python -m jobs.<name>`: handed to `jobs.cli.main.main` by its module."""

    name: str
    """of the module, and of the YAML file in conf/"""
    run: Callable[[Any], Path | str]
    """does the work of a checked config; returns what to print last"""
    plan: Callable[[Any], list[str]]
    """what `run` would do, in lines for a person; touches nothing"""
