"""What `evaluate.tasks` asks for: the rows of its table, and the tasks behind them.

A word is a task, group or tag of the harness, a YAML file of one, a preset's name, or a YAML file
of a preset. A preset is a file of `presets/` with `rows`: `name`, `tasks` (words again),
`num_fewshot`, `metrics` (their mean counts where there are several), and `lowest` where scores are
normalised: what guessing scores, for all tasks or by task, or `choices` for 1 / the choices that a
task's definition lists. Tasks of a preset's row count alike, whatever their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.harness.definitions import SUFFIXES, Branch, Definitions, Task
from sparsify.errors import InputError
from sparsify.params import close_match

PRESETS = Path(__file__).parent / "presets"

OWN = "tasks"
"""section of the tasks that no preset asks for"""

_KEYS = {"name", "tasks", "num_fewshot", "metrics", "lowest"}


@dataclass(frozen=True)
class Row:
    """A row of the table: the mean of some tasks' scores."""

    section: str
    """the preset, or `OWN`"""
    name: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    """`metric,filter`, or the metric alone for its first filter; none: the first of the task"""
    by_size: bool = False
    """whether tasks count by their documents"""
    lowest: tuple[float, ...] | None = None
    """of each task, the score that counts as 0; None: scores are as they are"""


@dataclass
class Plan:
    """All rows, and every task once."""

    rows: list[Row] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)
    num_fewshot: dict[str, int | None] = field(default_factory=dict)
    """by task; None: as its definition says"""

    def add(self, task: Task, num_fewshot: int | None) -> None:
        """Enter a task that a row needs.

        Raises:
            InputError: another one of the name, or with other examples, is there already.
        """
        known = self.tasks.setdefault(task.name, task)
        own = task.config.get("num_fewshot")
        shots = own if num_fewshot is None or own == 0 else num_fewshot
        if known.digest != task.digest:
            raise InputError(f"evaluate.tasks: two different tasks are called {task.name}")
        if self.num_fewshot.setdefault(task.name, shots) != shots:
            raise InputError(
                f"evaluate.tasks: {task.name} is asked for with {self.num_fewshot[task.name]} and "
                f"with {shots} examples; evaluate it in two runs"
            )


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def planned(words: Sequence[str], num_fewshot: int | None, may_run_code: bool) -> Plan:
    """Rows and tasks of `evaluate.tasks`.

    Args:
        words: of the option.
        num_fewshot: of the option; None leaves it to the tasks.
        may_run_code: let task files name Python.

    Raises:
        InputError: see `definitions.Definitions.find`; a preset that is not written as one; a
            number of examples beside a preset, which says its own.
    """
    definitions, plan = Definitions(may_run_code), Plan()
    for word in words:
        preset = _preset(word, definitions)
        if preset is None:
            for branch in _found(word, definitions):
                metrics = (branch.metric,) if branch.metric else ()
                names = tuple(task.name for task in branch.tasks)
                plan.rows.append(Row(OWN, branch.name, names, metrics, branch.by_size))
                for task in branch.tasks:
                    plan.add(task, num_fewshot)
            continue
        if num_fewshot is not None:
            raise InputError(
                f"evaluate.num_fewshot={num_fewshot}: preset {word} says the examples of its tasks "
                "itself; leave it out"
            )
        name, rows = preset
        for row in rows:
            plan.rows.append(_preset_row(name, row, definitions, plan))
    seen: set[tuple[str, str]] = set()
    for planned_row in plan.rows:
        key = (planned_row.section, planned_row.name)
        if key in seen:
            raise InputError(f"evaluate.tasks: {planned_row.name} is asked for twice; once will do")
        seen.add(key)
    return plan


def _found(word: str, definitions: Definitions) -> list[Branch]:
    try:
        return definitions.find(word)
    except InputError as error:
        if hint := close_match(word, presets()):
            raise InputError(
                f"evaluate.tasks: no task, group or preset is called {word!r}{hint}"
            ) from error
        raise


def _preset(word: str, definitions: Definitions) -> tuple[str, list[dict[str, Any]]] | None:
    """Name and rows of a preset; None where the word is none."""
    path = Path(word).expanduser().absolute()
    if word in presets():
        path = PRESETS / f"{word}.yaml"
    elif not word.endswith(SUFFIXES) or not path.is_file():
        return None
    content = definitions.read(path)
    if "rows" not in content:
        return None
    rows = content["rows"]
    for row in rows if isinstance(rows, list) and rows else [None]:
        if not isinstance(row, dict) or set(row) - _KEYS or not {"name", "tasks"} <= set(row):
            raise InputError(
                f"evaluate.tasks: preset {path}: each of its rows is a name, tasks and, where they "
                f"are wanted, num_fewshot, metrics and lowest; not {row!r}"
            )
    return path.stem, [{**row, "folder": path.parent} for row in rows]


def _preset_row(section: str, row: dict[str, Any], definitions: Definitions, plan: Plan) -> Row:
    tasks: list[Task] = []
    for word in row["tasks"]:
        if word.endswith(SUFFIXES):
            word = str(row["folder"] / word)
        tasks += [task for branch in definitions.find(word) for task in branch.tasks]
    for task in tasks:
        plan.add(task, row.get("num_fewshot"))
    names = tuple(task.name for task in tasks)
    lowest = row.get("lowest")
    bounds = None if lowest is None else tuple(_lowest(lowest, task, row["name"]) for task in tasks)
    return Row(section, row["name"], names, tuple(row.get("metrics") or ()), False, bounds)


def _lowest(given: Any, task: Task, row: str) -> float:
    """What guessing scores on a task."""
    if given == "choices":
        choices = task.config.get("doc_to_choice")
        if isinstance(choices, list) and choices:
            return 1 / len(choices)
        given = None
    value = given.get(task.name) if isinstance(given, dict) else given
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(
            f"evaluate.tasks: preset row {row}: no lowest score of {task.name} from 0 to below 1"
        )
    return float(value)
