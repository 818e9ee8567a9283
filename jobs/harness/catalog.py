"""Which names tasks, groups and tags have, and in which files: read off the files' lines.

lm-evaluation-harness parses all of its 14,000 files to know; this reads the few lines that name
something, and neither imports the package nor runs anything in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib import util
from pathlib import Path

import yaml

from sparsify.errors import InputError

EXTRA = 'pip install "twofour[eval]"'

_LINES = re.compile(
    r"""^["']?(task|group|tag|include)["']?:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)""", re.MULTILINE
)


@dataclass
class Catalog:
    """Name -> file, or of a tag the names of its tasks."""

    tasks: dict[str, Path] = field(default_factory=dict)
    groups: dict[str, Path] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Everything that can be asked for."""
        return [*self.tasks, *self.groups, *self.tags]


def installed_tasks() -> Path:
    """Folder of the tasks that the installed harness has.

    Raises:
        InputError: it is not installed.
    """
    spec = util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise InputError(
            f"evaluate.tasks: needs lm-evaluation-harness, which is not installed; {EXTRA}"
        )
    return Path(spec.origin).resolve().parent / "tasks"


@cache
def catalog(folder: Path, is_deep: bool = True) -> Catalog:
    """The names in the YAML files of a folder, with those below it where `is_deep`."""
    found, templates = Catalog(), dict[Path, list[str]]()
    files = folder.rglob("*.yaml") if is_deep else folder.glob("*.yaml")
    for path in sorted(files, key=lambda path: path.as_posix()):
        lines = _named(path)
        name, tags = _scalar(lines.get("task")), lines.get("tag")
        if group := _scalar(lines.get("group")):
            found.groups.setdefault(group, path)
        elif name and name not in found.tasks:
            found.tasks[name] = path
            own = _listed(tags) if tags is not None else _inherited(path, lines, templates)
            for tag in own:
                found.tags.setdefault(tag, []).append(name)
    return found


def _named(path: Path) -> dict[str, str]:
    return dict(_LINES.findall(path.read_text(encoding="utf-8", errors="replace")))


def _scalar(text: str | None) -> str | None:
    """The value where it is one word; None where it is a list or something else."""
    if text is None or "\n" in text or text.startswith(("[", "!")):
        return None
    return text.split(" #")[0].strip().strip("\"'") or None


def _listed(text: str) -> list[str]:
    try:
        value = yaml.safe_load(text) or []
    except yaml.YAMLError:
        return []
    return [str(tag) for tag in (value if isinstance(value, list) else [value])]


def _inherited(path: Path, lines: dict[str, str], known: dict[Path, list[str]]) -> list[str]:
    """Tags that a task has of the file that it includes."""
    included = _scalar(lines.get("include"))
    if included is None or not (template := path.parent / included).is_file():
        return []
    if template not in known:
        inner = _named(template)
        tags = inner.get("tag")
        known[template] = _listed(tags) if tags is not None else _inherited(template, inner, known)
    return known[template]
