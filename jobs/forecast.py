"""Where a recovery will end: `python -m jobs.forecast RUN`, of a run in progress or a finished one.

Reads the run's training KL so far and its planned learning rates, and says what the last ones will
be. Looks at files only: it starts nothing and disturbs no run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.options.distill import DistillConfig
from jobs.cli.streams import take_any_text
from jobs.runs.artifact import RECORD, read_record
from jobs.runs.folder import read_json
from jobs.runs.tracking import METRICS_FILE
from jobs.training.schedule import num_final_steps, planned_rates
from sparsify.errors import InputError

if TYPE_CHECKING:  # costs torch
    from sparsify.training.forecast import Forecast

_EXIT_INPUT = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m jobs.forecast",
        description="Predict where a recovery's training KL (or other loss) will end, with an "
        "interval, from what the run has logged so far.",
        epilog="EXAMPLES\n  python -m jobs.forecast runs/embedded-2-4-twofour\n"
        "  python -m jobs.forecast runs/embedded-2-4-twofour --share 0.3  (had it been asked then)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("run", type=Path, help="the run's folder")
    top.add_argument("--metric", default="kl", help="kl, ce, square_head or loss (default: kl)")
    shown = "share of runs whose end should lie in the interval (default: %(default)s)"
    top.add_argument("--coverage", type=float, default=0.8, metavar="SHARE", help=shown)
    early = "use only this first share of the run's steps: what a finished run would have said"
    top.add_argument("--share", type=float, metavar="SHARE", help=early)
    top.add_argument("--json", action="store_true", help="print all figures as JSON")
    return top


def main(argv: list[str] | None = None) -> int:
    """Print one forecast; the exit code."""
    take_any_text()
    options = parser().parse_args(argv)
    try:
        if options.share is not None and not 0 < options.share <= 1:
            raise InputError(f"--share {options.share}: must be above 0 and at most 1")
        found = forecast_run(options.run, options.metric, options.coverage, options.share)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_INPUT
    print(
        json.dumps(found.as_dict(), indent=2) if options.json else sentence(found, options.metric)
    )
    return 0


def forecast_run(run_dir: Path, metric: str, coverage: float, share: float | None) -> Forecast:
    """The forecast of a run's training loss from its files.

    Raises:
        InputError: the folder has no recovery, or its steps have no such metric.
    """
    from sparsify.training.forecast import forecast  # costs torch

    rates = rates_of(_settings(run_dir))
    last = len(rates) if share is None else round(share * len(rates))
    points = {step: value for step, value in _points(run_dir, metric).items() if step <= last}
    steps = sorted(points)
    values = [points[step] for step in steps]
    return forecast(steps, values, rates, num_final_steps(len(rates)), coverage)


def rates_of(settings: dict[str, Any]) -> list[float]:
    """The learning rate of every step, from the part of a record that decides the weights."""
    distill, data = settings["distill"], settings["data"]
    known = DistillConfig.__dataclass_fields__
    config = DistillConfig(**{key: value for key, value in distill.items() if key in known})
    total = config.num_tokens // (config.batch_size * data["sequence_length"])
    return planned_rates(config, total)


def _settings(run_dir: Path) -> dict[str, Any]:
    """The config in a recovery's identity: of the one in progress, or else of the finished one."""
    begun = run_dir / ".distill.partial" / "begun.json"
    if begun.is_file():
        found = read_json(begun, "run the recovery again with run.redo=[distill]")
    elif (run_dir / "distill" / RECORD).is_file():
        found = read_record(run_dir / "distill")
    else:
        raise InputError(
            f"{run_dir}: no recovery in this folder; give the folder of a run (run.dir=)"
        )
    try:
        return dict(found["identity"]["config"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{run_dir}: its recovery does not say what it was made from") from None


def _points(run_dir: Path, metric: str) -> dict[int, float]:
    """Value by step: of the record of a finished recovery, of the log of one in progress.

    A resumed run repeats the steps since its checkpoint: what the log had of them before does not
    count. A step without a finite value has no point.
    """
    folder = run_dir / "distill"
    if (folder / RECORD).is_file() and not (run_dir / ".distill.partial").exists():
        steps = read_record(folder)["metrics"].get("steps", [])
        lines = [{"step": s["step"], metric: s.get(metric)} for s in steps]
    else:
        lines = _logged(run_dir / METRICS_FILE, metric)
    points = {line["step"]: line[metric] for line in lines if isinstance(line[metric], float)}
    if lines and not any(points.values()):
        raise InputError(f"{run_dir}: its steps have no {metric}; choose another --metric")
    return points


def _logged(path: Path, metric: str) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file, so nothing is known of the run's steps")
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if f'"distill/{metric}"' in line and line.endswith("\n"):  # else it is being written
            try:
                values = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: a damaged line ({error}): {line[:60]!r}") from None
            # A step that was there before: the run went back to a checkpoint, or started again.
            while lines and lines[-1]["step"] >= values["step"]:
                lines.pop()
            lines.append({"step": values["step"], metric: values[f"distill/{metric}"]})
    return lines


def sentence(found: Forecast, metric: str) -> str:
    """One line for a terminal."""
    name = {"kl": "KL", "ce": "cross-entropy"}.get(metric, metric.replace("_", " "))
    done = f"at {100 * found.last_step / found.num_steps:.0f} % ({found.last_step:,} of "
    done += f"{found.num_steps:,} steps)"
    if found.reason is not None:
        return f"no forecast {done}: {found.reason}"
    return (
        f"final {name} {found.predicted:.3g} ({100 * found.coverage:g} %: {found.low:.3g}.."
        f"{found.high:.3g}), now {found.now:.3g} {done}"
    )


if __name__ == "__main__":
    sys.exit(main())
