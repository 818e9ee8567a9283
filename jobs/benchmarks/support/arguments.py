"""Command line options that several benchmarks share, spelled the same way in all of them."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any


def add_option(parser: ArgumentParser, name: str, default: Any, text: str, **more: Any) -> None:
    """Add an option whose help ends with its default, if it has one; numbers give their type."""
    if isinstance(default, int | float):
        more["type"] = type(default)
    if default is not None:
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text = f"{text} (default: {shown})"
    parser.add_argument(name, default=default, help=text, **more)


def add_calibration(parser: ArgumentParser, samples: int, length: int, batch_size: int) -> None:
    """--samples, --length, --batch-size and --seed."""
    add_option(parser, "--samples", samples, "calibration rows")
    add_option(parser, "--length", length, "tokens per row")
    add_option(parser, "--batch-size", batch_size, "rows per forward")
    add_option(parser, "--seed", 0, "random weights and tokens")


def add_threads(parser: ArgumentParser) -> None:
    """--threads."""
    add_option(parser, "--threads", None, "CPU threads (default: every CPU)", type=int)
