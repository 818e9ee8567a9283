"""The stages on the driver: what decides their results, and what they ask of the workers."""

import importlib

from jobs.runs.stage import Stage


def stage(name: str) -> Stage:
    """The stage of this name, as its module of this package describes it."""
    found: Stage = importlib.import_module(f"{__name__}.{name}").STAGE
    return found
