"""The options of every command, read off its dataclass, and the presets that conf/ has.

Knows nothing of Hydra; importing it costs milliseconds, so that help and most mistakes answer at
once.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from conf import schema
from conf.schema import written_name
from jobs.cli.command import Command, find_command
from sparsify.errors import InputError
from sparsify.params import as_list, close_match

CONF_DIR = Path(schema.__file__).parent

JOBS = tuple(
    path.stem
    for path in sorted(Path(__file__).parents[1].glob("*.py"))
    if "\nCOMMAND = " in path.read_text(encoding="utf-8")
)
"""Every command that has options of conf/."""


@dataclass(frozen=True)
class Option:
    """One `key=value` that a command line may set."""

    key: str
    """dotted name as people write it"""
    type_name: str
    """int, float, bool, str or list[str]"""
    optional: bool
    """whether null is a value"""
    owner: type
    """dataclass that has the field"""
    field: str
    """name of the field there"""
    default: Any
    is_path: bool
    """whether it names a file or folder"""


def _walk(config_class: type, prefix: str = "") -> dict[str, Option]:
    """The fields of a dataclass and of those inside: its own before those that it inherits, and
    groups last."""
    found: dict[str, Option] = {}
    hints, own = get_type_hints(config_class), list(config_class.__annotations__)
    order = {name: place for place, name in enumerate(own)}

    def place(item: Field[Any]) -> tuple[bool, int]:
        return is_dataclass(hints[item.name]), order.get(item.name, len(own))

    for item in sorted(fields(config_class), key=place):
        key = prefix + written_name(item.name)
        if is_dataclass(hints[item.name]):
            found |= _walk(hints[item.name], f"{key}.")
        else:
            name = str(item.type)
            found[key] = Option(
                key, name.removesuffix(" | None"), name.endswith(" | None"),
                config_class, item.name, _default(item), bool(item.metadata.get("is_path")),
            )  # fmt: skip
    return found


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


@cache
def command_options(command: Command) -> dict[str, Option]:
    """Every option of a command by its key, in the order in which help shows them."""
    every, used = _walk(command.config), command.uses
    return {k: o for k, o in every.items() if not used or {k, k.split(".")[0]} & set(used)}


def job_options(job: str) -> dict[str, Option]:
    """The options of the command `python -m jobs.<job>`."""
    return command_options(find_command(job))


def presets(folders: Sequence[Path] = (CONF_DIR,)) -> dict[str, list[str]]:
    """Group -> names that `group=` takes: the YAML files in the sub-folders of `folders`."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in folder.glob("*/*.yaml")):
        found.setdefault(path.parent.name, set()).add(path.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


def command_presets(
    command: Command, folders: Sequence[Path] = (CONF_DIR,)
) -> dict[str, list[str]]:
    """`presets` without those of another command."""
    own = {job for job in JOBS if job != command.name and job not in schema_groups()}
    return {group: names for group, names in presets(folders).items() if group not in own}


def schema_groups() -> set[str]:
    """Groups of options that several commands have."""
    return {field.name for field in fields(schema.Config)}


def cluster_names() -> list[str]:
    """Names that `+cluster=` takes."""
    return presets()["cluster"]


def known_preset(word: str, name: str, names: Sequence[str]) -> None:
    """Require that a preset exists.

    Raises:
        InputError: it does not; says which there are.
    """
    if name not in names:
        group = word.partition("=")[0].lstrip("+")
        raise InputError(
            f"{word}: no such {group}{close_match(name, names)}; there are: {', '.join(names)}"
        )


def known_option(command: Command, key: str, text: str) -> Option:
    """The option of that name.

    Raises:
        InputError: the command has no such option; says which may be meant.
    """
    options = command_options(command)
    if key in options:
        return options[key]
    inside = [known for known in options if known.startswith(f"{key}.")]
    if inside:
        raise InputError(
            f"{key}={text}: {key} is a group of options; set one of them, such as {inside[0]}=..."
        )
    if key in job_options("prune"):
        raise InputError(f"{key}: {_unused(command, key)}")
    raise InputError(f"{key}: unknown option{_matches(key, list(options))}; {_level(key, options)}")


def _unused(command: Command, key: str) -> str:
    if key == "stages":
        return (
            f"jobs.{command.name} runs its one stage; for several use "
            "python -m jobs.prune 'stages=[...]' run.from=..."
        )
    return f"is not used by jobs.{command.name}, which takes: {', '.join(command.uses)}"


def _matches(key: str, known: list[str]) -> str:
    leaf = key.rsplit(".", 1)[-1]
    close = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    close.sort(key=lambda name: -difflib.SequenceMatcher(None, key, name).ratio())
    close += difflib.get_close_matches(key, known, n=3, cutoff=0.7)
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    close += [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    close = list(dict.fromkeys(close))[:3]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _level(key: str, options: dict[str, Option]) -> str:
    """The names that exist where `key` was looked for."""
    group = key.rpartition(".")[0]
    if group in options:
        return f"{group} is a value and has no options of its own"
    while group:
        inside = [k.removeprefix(f"{group}.") for k in options if k.startswith(f"{group}.")]
        if inside:
            names = dict.fromkeys(k.split(".")[0] + (".*" if "." in k else "") for k in inside)
            return f"options of {group}: {', '.join(names)}"
        group = group.rpartition(".")[0]
    tops = dict.fromkeys(k.split(".")[0] + (".*" if "." in k else "") for k in options)
    return f"there are: {', '.join(tops)}"


def expand_homes(command: Command, plain: dict[str, Any]) -> None:
    """Put the home folder for ~ into paths: shells do not, behind an equals sign.

    Raises:
        InputError: ~NAME of no user.
    """
    for option in command_options(command).values():
        *groups, leaf = option.key.split(".")
        node = plain
        for group in groups:
            node = node[group]
        if option.is_path and str(node[leaf]).startswith("~"):
            node[leaf] = home_expanded(option.key, node[leaf])


def home_expanded(key: str, path: str) -> str:
    """A path with the home folder in place of ~ or ~USER.

    Raises:
        InputError: there is no such user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise InputError(
            f"{key}={path}: {path.partition('/')[0]} is no user's home folder; write ./{path} for "
            "a folder of that name"
        )
    return found


def written(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return as_list(value)
    if isinstance(value, int) and abs(value) >= 100_000:
        return f"{value:_}"
    text = str(value)
    return f"'{text}'" if set(text) & set(" <>|") else text


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
