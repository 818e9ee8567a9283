"""How a machine differs from the plan, from the records of runs that finished on such machines."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import Config
from jobs.planning.layouts import Machine, machine_of, pruning_of, training_of
from jobs.planning.models import shape_of
from sparsify.costs.seconds import pruning_seconds, step_seconds, total
from sparsify.errors import InputError, first_line

Load = Callable[[str], Config]
"""the config of a run by its command line"""


@dataclass(frozen=True)
class Calibration:
    """Measured over planned, by stage."""

    ratios: dict[str, list[float]] = field(default_factory=dict)
    """stage -> one ratio for every run"""
    left_out: list[str] = field(default_factory=list)
    """what of the records said nothing, in words"""

    def factor(self, stage: str) -> float:
        """What times are multiplied with; 1 where nothing was measured."""
        ratios = self.ratios.get(stage)
        return typical(ratios) if ratios else 1.0


def typical(ratios: Sequence[float]) -> float:
    """The median, of logarithms: one run that was planned badly does not spoil other plans."""
    return math.exp(statistics.median(map(math.log, ratios)))


def read_calibration(records: Sequence[str], machine: Machine, load: Load) -> Calibration:
    """Compare finished runs with what would have been planned for them.

    Args:
        records: folders of runs, or records of `jobs.bench plan`.
        machine: that is planned for; the runs' own machines are in their records.
        load: from the command line of a record, which says what its figures leave out.

    Raises:
        InputError: a folder or file that is no record.
    """
    found = Calibration()
    for name in records:
        path = Path(name)
        if path.is_file():
            _from_benchmark(path, machine, found)
        elif path.is_dir():
            _from_run(path, machine, load, found)
        else:
            raise InputError(f"plan.records={name}: there is no such folder or file")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(
            f"plan.records={path}: cannot be read ({first_line(error)}); leave it out"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"plan.records={path}: is no record but a {type(found).__name__}")
    return found


def _from_benchmark(path: Path, machine: Machine, found: Calibration) -> None:
    record = _read(path)
    try:
        runs = record["figures"]["runs"] if record["benchmark"] == "plan" else []
        ratios = [(str(run["kind"]), _ratio(run["measured_s"], run["base_s"])) for run in runs]
    except (KeyError, TypeError, ValueError):
        ratios = []
    if not ratios:
        raise InputError(f"plan.records={path}: is no record of python -m jobs.bench plan")
    if machine.card is not None and record.get("device") == "cpu":
        raise InputError(f"plan.records={path}: was measured on a CPU, and this plans for a GPU")
    for kind, ratio in ratios:
        found.ratios.setdefault(kind, []).append(ratio)


def _ratio(measured_s: Any, planned_s: Any) -> float:
    found = float(measured_s) / float(planned_s)
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"its times are {measured_s} and {planned_s} s")
    return found


def _from_run(folder: Path, machine: Machine, load: Load, found: Calibration) -> None:
    """The recovery and the main method's pruning of a run's folder.

    Whatever is amiss with a stage's record is said, and the stage left out.
    """
    seen = False
    for stage, compare in (("distill", _recovery), ("prune", _pruning)):
        path = folder / stage / "record.json"
        if not path.is_file():
            continue
        seen = True
        record = _read(path)
        try:
            config = load(record["command"])
            _require_machine(config, machine)
            ratio = compare(record["metrics"], config)
        except KeyError as error:
            found.left_out.append(f"{stage} of {folder}: its record has no {error}")
            continue
        except (InputError, TypeError, ValueError, ZeroDivisionError) as error:
            found.left_out.append(f"{stage} of {folder}: {first_line(error)}")
            continue
        found.ratios.setdefault(stage, []).append(ratio)
    if not seen:
        raise InputError(f"plan.records={folder}: has no finished prune or distill stage")


def _require_machine(config: Config, machine: Machine) -> None:
    """Refuse a run on another kind of machine: its ratio says nothing of this one."""
    name = machine_of(config, 1.0).name
    if name != machine.name:
        raise InputError(f"it ran on {name}, and this plans for {machine.name}")


def _recovery(metrics: dict[str, Any], config: Config) -> float:
    machine = machine_of(config.of_stage("distill"), 1.0)
    shape, _ = shape_of(config.model.path)
    setup = training_of(config, machine)
    teacher = None if config.distill.teacher_cache else shape
    planned = total(step_seconds(shape, teacher, setup, machine.rates(setup.element_bytes)))
    tokens = config.distill.batch_size * config.data.sequence_length
    return _ratio(tokens / metrics["tokens_per_s"], planned)


def _pruning(metrics: dict[str, Any], config: Config) -> float:
    machine = machine_of(config.of_stage("prune"), 1.0)
    shape, _ = shape_of(config.model.path)
    setup = pruning_of(config, machine, metrics["method"], shape)
    planned = pruning_seconds(shape, setup, machine.rates(setup.element_bytes), config.prune)
    return _ratio(metrics["seconds"][metrics["method"]], total(planned))
