"""Definitions of tasks as plain values: read from YAML, their files found, groups taken apart.

Nothing here imports lm-evaluation-harness or runs what a definition names, so that all that can be
wrong with one is said before anything is started.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.harness.catalog import Catalog, catalog, installed_tasks
from jobs.harness.data_files import check_data, local_files, with_absolute_paths
from sparsify.errors import InputError, first_line
from sparsify.files import file_sha256, readable
from sparsify.params import close_match

SUFFIXES = (".yaml", ".yml")

_OF_GROUPS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata"}
"""keys of a group that are no defaults of its tasks"""

_STRUCTURE = ("tag", "group", "task_list")
"""keys of a task that say where it belongs"""


@dataclass(frozen=True)
class Function:
    """Python that a definition names (`!function utils.f`)."""

    folder: str
    name: str

    @property
    def file(self) -> Path:
        """Where it is, if beside the definition."""
        return Path(self.folder) / f"{self.name.rpartition('.')[0].replace('.', '/')}.py"


@dataclass(frozen=True)
class Task:
    """One task."""

    name: str
    config: dict[str, Any]
    """its whole definition, with absolute paths; Python in it as `Function`"""
    digest: str
    """of the definition, and of the local files that it names"""


@dataclass(frozen=True)
class Branch:
    """A task, or a group that has a score of its own."""

    name: str
    tasks: tuple[Task, ...]
    metric: str | None = None
    """of a group; with or without its filter"""
    by_size: bool = True
    """whether tasks of a group count by their documents"""


class Definitions:
    """What words of `evaluate.tasks` stand for.

    Args:
        may_run_code: let definitions that are not the harness's own name Python.
    """

    def __init__(self, may_run_code: bool) -> None:
        self._may_run_code = may_run_code
        self._stock = installed_tasks()

    def find(self, word: str) -> list[Branch]:
        """Tasks and groups of a name, or of a YAML file.

        Raises:
            InputError: nothing is called so; a file that is missing or no definition; data files
                that are missing or do not fit each other; Python that is not allowed.
        """
        if not word.endswith(SUFFIXES):
            return self._named(word, catalog(self._stock), {}, "evaluate.tasks")
        path = Path(word).expanduser().absolute()
        config = self.read(path)
        if "group" in config:
            return self._group(config, path, {})
        return [Branch(str(config.get("task")), (self._task(config, path),))]

    def read(self, path: Path) -> dict[str, Any]:
        """A definition with what it includes.

        Raises:
            InputError: see `find`.
        """
        return self._read(path, ())

    def _read(self, path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
        where = f"evaluate.tasks: {path}"
        if path in seen:
            raise InputError(f"{where}: includes itself; take the include out")
        if not path.is_file():
            raise InputError(f"{where}: there is no such file; check the name")
        try:
            with readable(where):
                config = yaml.load(path.read_bytes(), Loader=self._loader(path))  # noqa: S506 - safe
        except yaml.YAMLError as error:
            raise InputError(f"{where}: not valid YAML ({first_line(error)})") from None
        if not isinstance(config, dict):
            raise InputError(f"{where}: no definition of a task (keys and values) in it")
        included = config.pop("include", [])
        merged: dict[str, Any] = {}
        for name in included if isinstance(included, list) else [included]:
            inner = self._read((path.parent / str(name)).resolve(), (*seen, path))
            inner.pop("task_list", None)  # of the tasks in that file
            merged |= inner
        if not self._is_stock(path):
            config = with_absolute_paths(config, path.parent)
        return merged | config

    def _loader(self, path: Path) -> type[yaml.SafeLoader]:
        """Reads plain values, and names of Python where the file may have them."""
        is_allowed = self._may_run_code or self._is_stock(path)

        class Loader(yaml.SafeLoader):
            pass

        def function(_: yaml.SafeLoader, node: yaml.ScalarNode) -> Function:
            if not is_allowed:
                raise InputError(
                    f"evaluate.tasks: {path}: names Python code (!function {node.value}), which is "
                    "run where the file is used; read it, then add evaluate.allow_task_code=true"
                )
            return Function(str(path.parent), str(node.value))

        Loader.add_constructor("!function", function)
        return Loader

    def _is_stock(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self._stock)

    def _named(
        self, name: str, known: Catalog, defaults: dict[str, Any], where: str
    ) -> list[Branch]:
        if name in known.tasks:
            path = known.tasks[name]
            return [Branch(name, (self._task(self.read(path) | defaults, path),))]
        if name in known.groups:
            path = known.groups[name]
            return self._group(self.read(path), path, defaults)
        if name in known.tags:
            found = sorted(known.tags[name])
            return [branch for one in found for branch in self._named(one, known, defaults, where)]
        raise InputError(
            f"{where}: no task, group or preset is called {name!r}"
            f"{close_match(name, known.names)}; a task file of your own ends in .yaml"
        )

    def _group(self, config: dict[str, Any], path: Path, defaults: dict[str, Any]) -> list[Branch]:
        """A group as one branch where it has a score of its own, else its members."""
        name, members = str(config["group"]), config.get("task") or []
        own = {key: value for key, value in config.items() if key not in _OF_GROUPS} | defaults
        branches = [
            branch
            for member in (members if isinstance(members, list) else [members])
            for branch in self._member(member, path, own)
        ]
        if not branches:
            raise InputError(f"evaluate.tasks: {path}: group {name} has no tasks")
        metrics = config.get("aggregate_metric_list") or []
        if not metrics:
            return branches
        first = metrics[0] if isinstance(metrics, list) else metrics
        filters = first.get("filter_list")
        chosen = filters[0] if isinstance(filters, list) else filters
        metric = f"{first['metric']},{chosen}" if chosen else str(first["metric"])
        tasks = tuple(task for branch in branches for task in branch.tasks)
        return [Branch(name, tasks, metric, bool(first.get("weight_by_size", True)))]

    def _member(self, member: Any, path: Path, defaults: dict[str, Any]) -> list[Branch]:
        """An entry of a group's list: a name, a task with values of its own, or a group inside."""
        known = catalog(self._stock) if self._is_stock(path) else catalog(path.parent, False)
        where = f"evaluate.tasks: {path}"
        if isinstance(member, str):
            if member not in known.names and not self._is_stock(path):
                known = catalog(self._stock)
            return self._named(member, known, defaults, where)
        if not isinstance(member, dict) or not {"task", "group"} & set(member):
            raise InputError(f"{where}: {member!r} is neither a task's name nor a task or group")
        if "group" in member:
            name = str(member["group"])
            if name in known.groups:
                inner = {key: value for key, value in member.items() if key != "group"}
                return self._named(name, known, defaults | inner, where)
            return self._group(member, path, defaults)
        name = str(member["task"])
        if name in known.names:
            inner = {key: value for key, value in member.items() if key != "task"}
            return self._named(name, known, defaults | inner, where)
        own = member if self._is_stock(path) else with_absolute_paths(member, path.parent)
        return [Branch(name, (self._task(defaults | own, path),))]

    def _task(self, config: dict[str, Any], path: Path) -> Task:
        """A whole definition, whose data are there."""
        where = f"evaluate.tasks: {path}"
        if not isinstance(config.get("task"), str):
            raise InputError(f"{where}: no 'task' in it that names the task")
        if config.get("unsafe_code") and not self._may_run_code:
            raise InputError(
                f"{where}: runs code that the model writes; where that may be, add "
                "evaluate.allow_task_code=true"
            )
        config = {key: value for key, value in config.items() if key not in _STRUCTURE}
        check_data(config, where)
        return Task(config["task"], config, _digest(config, self._stock))


def _digest(config: dict[str, Any], stock: Path) -> str:
    """Of the definition, and of the bytes of the local files that it names."""
    functions: list[Function] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Function):
            functions.append(value)
            return f"!function {value.name}"
        return str(value)

    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=plain).encode())
    files = {function.file for function in functions} | set(local_files(config))
    for file in sorted(files):
        if file.is_file() and not file.is_relative_to(stock):
            digest.update(file_sha256(file).encode())
    return digest.hexdigest()
