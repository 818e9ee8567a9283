"""What the pipeline knows of a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext


@dataclass(frozen=True)
class Stage:
    """One stage, as its module of jobs/stages describes it."""

    name: str
    makes: str
    """its result in a few words, for the plan and the display"""
    identity: Callable[[StageContext], dict[str, Any]]
    """the plain values that decide its result"""
    run: Callable[[StageContext, StageWriter], dict[str, Any]]
    """fills the writer's folder and returns metrics"""
    check: Callable[[StageContext], None] | None = None
    """finds what is wrong with the stage's own inputs before any stage starts"""
    may_extend: bool = False
    """more inputs than last time are a reason to run again, not a conflict"""
    is_derived: bool = False
    """only shows other stages, so that whatever changed in them is a reason to run again"""
