"""Benchmarks: this project beside others, beside itself on more processes, and beside arithmetic.

`python -m jobs.bench NAME` measures both sides in one run, prints a table and writes a dated JSON
record. One file of jobs/benchmarks per benchmark; this one only reads the command line.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

from sparsify.errors import InputError, TwofourError

_BENCHMARKS = {
    "prune": "pruning compared with llm-compressor: time, memory, layer errors",
    "scaling": "the same pruning by 1, 2, 4 processes: speed-up and equal masks",
    "memory": "prune a checkpoint larger than the memory that may be held",
    "quality": "methods side by side on real models: perplexity, one-shot and recovered",
    "recovery": "losses and moving masks compared at equal tokens, beside a dense model continued",
    "kernel": "the sweep over a layer's columns compared with the plain column loop",
    "data": "training rows read by one process, compared with what a node of GPUs needs",
    "loss": "the loss from hidden states compared with its matrix products and with full logits",
    "step": "a step of recovery compared with the arithmetic of its two models, and its parts",
    "model": "a whole model's time and memory from some of its blocks, phase by phase",
}

_EXAMPLES = (
    "python -m jobs.bench prune --against llmcompressor --threads 1",
    "python -m jobs.bench prune --against llmcompressor --model embedded",
    "python -m jobs.bench scaling --workers 1 2 --reduction fixed",
    "python -m jobs.bench memory --checkpoint-gb 6 --limit-gb 3",
    "python -m jobs.bench quality --models embedded --out docs/benchmarks/quality.md",
    "python -m jobs.bench recovery --models embedded --recipes kl ce dense-ce",
    "python -m jobs.bench kernel --device cuda --save",
    "python -m jobs.bench data --store-gb 4 --save",
    "python -m jobs.bench loss --threads 1",
    "python -m jobs.bench step --threads 1 --save",
    "python -m jobs.bench step --shape llama-3.1-8b --layers 4 --sequence-length 8192 "
    "--batch-size 4 --micro-batch-size 1 --device cuda --engine plain --compile --save",
    "python -m jobs.bench model --shape llama-3.1-8b --blocks 3 --device cuda",
)

_EXIT_FAILED, _EXIT_INPUT, _EXIT_INTERRUPTED = 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand per benchmark."""
    lines = textwrap.indent("\n".join(_EXAMPLES), "  ")
    top = argparse.ArgumentParser(
        prog="python -m jobs.bench",
        description="Measure both sides of a comparison in one run, and keep a dated record.",
        epilog=f"EXAMPLES\n{lines}\n\nAll options of one: python -m jobs.bench NAME --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = top.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, summary in _BENCHMARKS.items():
        one = names.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        _module(name).add_arguments(one)
        _add_common(one, has_out=name not in ("quality", "recovery"))
    return top


def _add_common(one: argparse.ArgumentParser, has_out: bool) -> None:
    """Where files go; the record is --record where --out is something else (not `has_out`)."""
    where = one.add_argument_group("files")
    record = "the record (default: a dated name in the folder of --workdir)"
    flag = "--out" if has_out else "--record"
    where.add_argument(flag, type=Path, dest="record", metavar="FILE.json", help=record)
    saved = "put the record into docs/results, under a dated name"
    where.add_argument("--save", action="store_true", help=saved)
    kept = "models, environments, logs and records; used again by later runs (default: %(default)s)"
    where.add_argument("--workdir", type=Path, default=Path("runs/bench"), help=kept)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"jobs.benchmarks.{name}")


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(words)
    options.command = f"python -m jobs.bench {shlex.join(words)}"
    try:
        _run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_INPUT
    except TwofourError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_FAILED
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    return 0


def _run(options: argparse.Namespace) -> None:
    from jobs.benchmarks.support.record import build_record, default_name, render, write_record

    options.workdir.mkdir(parents=True, exist_ok=True)
    begun_s = time.time()
    outcome = _module(options.benchmark).run(options)
    record = build_record(options.benchmark, options.command, outcome, begun_s)
    print("\n" + render(outcome))
    folder = Path("docs/results") if options.save else options.workdir
    path = options.record or folder / default_name(record)
    write_record(record, path)
    print(f"\nrecord: {path}")


if __name__ == "__main__":
    sys.exit(main())
