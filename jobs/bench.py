"""Benchmarks: this project beside others, beside itself on more processes, and beside arithmetic.

`python -m jobs.bench NAME` measures both sides in one run, prints a table and writes a dated JSON
record. A benchmark is a file of jobs/benchmarks with SUMMARY (one line), EXAMPLES (command lines
without their beginning), `add_arguments(parser)` and `run(options)`; this file finds them there.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from jobs.benchmarks.support.record import build_record, default_name, render, write_record
from jobs.cli.streams import take_any_text
from jobs.reporting.chart_file import chart_file
from sparsify.errors import InputError, TwofourError
from sparsify.files import written_whole

_COMMAND = "python -m jobs.bench"

_EXIT_FAILED, _EXIT_INPUT, _EXIT_INTERRUPTED = 1, 2, 130


class _Benchmark(argparse.ArgumentParser):
    """The options of one benchmark, which is imported when they are read: it may need torch."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Add the benchmark's options, then read the command line."""
        name = self.prog.rpartition(" ")[2]
        module = importlib.import_module(f"jobs.benchmarks.{name}")
        where = self.add_argument_group("files")
        record = "the record (default: a dated name in the folder of --workdir)"
        where.add_argument(
            "--record", "--out", type=Path, dest="record", metavar="FILE.json", help=record
        )
        saved = "put the record into docs/results, under a dated name"
        where.add_argument("--save", action="store_true", help=saved)
        kept = "models, environments, logs and records; used again later (default: %(default)s)"
        where.add_argument("--workdir", type=Path, default=Path("runs/bench"), help=kept)
        module.add_arguments(self)
        self.set_defaults(run=module.run)
        return super().parse_known_args(args, namespace)


def described() -> dict[str, dict[str, Any]]:
    """Name -> SUMMARY and EXAMPLES of every benchmark, read from the files without an import."""
    found = {}
    for path in sorted(Path(__file__).with_name("benchmarks").glob("[!_]*.py")):
        lines = ast.parse(path.read_text(encoding="utf-8")).body
        found[path.stem] = {
            line.targets[0].id: ast.literal_eval(line.value)
            for line in lines
            if isinstance(line, ast.Assign)
            and isinstance(line.targets[0], ast.Name)
            and line.targets[0].id in ("SUMMARY", "EXAMPLES")
        }
    return found


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand per benchmark."""
    benchmarks = described()
    examples = "\n".join(
        f"  {_COMMAND} {words}" for known in benchmarks.values() for words in known["EXAMPLES"]
    )
    top = argparse.ArgumentParser(
        prog=_COMMAND,
        description="Measure both sides of a comparison in one run, and keep a dated record.",
        epilog=f"EXAMPLES\n{examples}\n\nAll options of one: {_COMMAND} NAME --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = top.add_subparsers(
        dest="benchmark", required=True, metavar="NAME", parser_class=_Benchmark
    )
    for name, known in benchmarks.items():
        summary = known["SUMMARY"]
        names.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            conflict_handler="resolve",  # a benchmark may mean something else by --out
        )
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; the exit code."""
    take_any_text()
    words = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(words)
    options.command = f"{_COMMAND} {shlex.join(words)}"
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
    options.workdir.mkdir(parents=True, exist_ok=True)
    started_s = time.time()
    outcome = options.run(options)
    record = build_record(options.benchmark, options.command, outcome, started_s)
    print("\n" + render(outcome))
    folder = Path("docs/results") if options.save else options.workdir
    path = options.record or folder / default_name(record)
    write_record(record, path)
    print(f"\nrecord: {path}")
    charts = [outcome.chart, *outcome.more_charts] if outcome.chart is not None else []
    for number, drawn in enumerate(charts, start=1):
        chart = path.with_name(f"{path.stem}{f'-{number}' if number > 1 else ''}.svg")
        with written_whole(chart) as temporary:
            temporary.write_text(chart_file(drawn), encoding="utf-8")
        print(f"chart: {chart}")
    if outcome.summary is not None:
        print(json.dumps({"benchmark": options.benchmark, "record": str(path), **outcome.summary}))


if __name__ == "__main__":
    sys.exit(main())
