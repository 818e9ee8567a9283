"""Command line options that several benchmarks share, spelled the same way in all of them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
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


def add_shape(parser: ArgumentParser, default: str, more: str = "") -> None:
    """--shape, a name in `random_llama.SHAPES`, or one of `more`."""
    shapes = "llama-3.1-8b, llama-3.1-70b, or a small one: bench-2k, bench-1k, tiny"
    add_option(parser, "--shape", default, shapes + more)


def add_threads(parser: ArgumentParser) -> None:
    """--threads."""
    add_option(parser, "--threads", None, "CPU threads (default: every CPU)", type=int)


def add_device(parser: ArgumentParser, default: str = "cpu") -> None:
    """--device and --threads."""
    add_option(parser, "--device", default, "where", choices=["cpu", "cuda"])
    add_threads(parser)


def add_set(parser: ArgumentParser, commands: str) -> None:
    """--set, for options of the commands that a benchmark runs."""
    more = f"more options for {commands}, such as prune.num_samples=64"
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=more)


def settings_of(options: Namespace, *names: str) -> dict[str, Any]:
    """The options `names` as they are kept in the record."""
    return {name: getattr(options, name) for name in names}
