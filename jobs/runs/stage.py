"""What the pipeline knows of a stage.

A new stage is a module of jobs/stages with a `STAGE` (on the driver, no torch at its top), one of
jobs/workers with what its workers do, and one of conf/options with its options; and two lines: its
name in `STAGES` of conf/options/run.py, where it runs, and its options as a field of
conf.schema.Config. One with workers has a field of cluster.stages.StageSpecs too. Its own command
is a thin jobs/<stage>.py, if it is to have one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.schema import Config

if TYPE_CHECKING:  # all know Stage
    from jobs.runs.artifact import StageWriter
    from jobs.runs.context import StageContext
    from jobs.runs.models import Models


@dataclass(frozen=True)
class Stage:
    """One stage, as its module of jobs/stages describes it."""

    name: str
    result: str
    """in a few words, for the plan and the display"""
    identity: Callable[[StageContext], dict[str, Any]]
    """the plain values that decide its result"""
    run: Callable[[StageContext, StageWriter], dict[str, Any]]
    """fills the writer's folder and returns metrics"""
    check: Callable[[Config, Models], None] | None = None
    """finds what is wrong with the stage's own inputs before anything is started"""
    describe: Callable[[Config, Models], list[str]] | None = None
    """lines for the plan of what is particular to the stage's inputs"""
    makes: Callable[[dict[str, Any]], dict[str, str]] | None = None
    """of its metrics: name -> folder in its own of every model for later stages, which build on the
    last of them"""
    told: Callable[[dict[str, Any]], str] | None = None
    """its outcome in a few words, of its metrics, for the display"""
    resumes: str = "starts over"
    """what it does when the same command comes again after it was interrupted"""
    is_end: bool = False
    """what it makes is to be served, and no later stage builds on it"""
    may_extend: bool = False
    """more inputs than last time are a reason to run again, not a conflict; what an interruption
    left lies under what decided it, and whatever of it still holds is used"""
    is_derived: bool = False
    """only shows other stages, so that whatever changed in them is a reason to run again"""
