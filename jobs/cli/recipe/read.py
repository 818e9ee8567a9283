"""A recipe file as words of a command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.options.run import STAGES
from jobs.cli.command import Command
from jobs.cli.options import command_options, home_expanded
from jobs.cli.recipe.args import Args, Found
from jobs.cli.recipe.modifiers import MODIFIERS, REFUSED, TRAINING
from jobs.cli.recipe.text import flattened, parse
from sparsify.errors import InputError
from sparsify.files import readable
from sparsify.params import as_list, close_match

_KEY = "run.recipe"


@dataclass(frozen=True)
class Recipe:
    """What a recipe comes to."""

    options: dict[str, Any]
    """key -> value"""
    warnings: list[str]
    """what of it is left out, a line each"""
    stages: list[str]
    """of prune, distill and quantize those it has, in order"""


def read_recipe(path: Path) -> Recipe:
    """Read a recipe of SparseML or llm-compressor, or one that a run wrote.

    Raises:
        InputError: it cannot be read, or says something that has no counterpart here: one line with
            the file, the line, the modifier and the key.
    """
    with readable(f"{_KEY}={path}"):
        if not path.is_file():
            raise InputError(f"{_KEY}={path}: there is no such file")
        try:
            return read_text(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{_KEY}={path}: is no text") from None
        except InputError as error:
            raise InputError(f"{_KEY}={path}: {error}") from None


def read_text(text: str) -> Recipe:
    """`read_recipe` of a text; its errors start with the line."""
    said, found = parse(text), Found()
    for modifier in said.modifiers:
        where = f"line {modifier.line}: {modifier.name}"
        if modifier.name in REFUSED:
            raise InputError(f"{where}: {REFUSED[modifier.name]}; remove it")
        if modifier.name not in MODIFIERS:
            raise InputError(
                f"{where}: no modifier that is known{close_match(modifier.name, list(MODIFIERS))}; "
                "nothing is ignored unseen: remove it, or say it with options"
            )
        fitting = "train" if modifier.name in TRAINING else "oneshot"
        if modifier.run_type not in (None, fitting):
            raise InputError(
                f"{where}: belongs to run_type: {fitting}, and {modifier.stage} says "
                f"{modifier.run_type}"
            )
        MODIFIERS[modifier.name](Args(modifier, found), modifier.name)
    if "distill.square_head_weight" in found.options:
        found.options.setdefault("distill.kl_weight", 0.0)  # the only term that was asked for
    order = [name for name in STAGES if name in found.stages]
    if order != found.stages:
        raise InputError(
            f"has {', '.join(found.stages)} in this order; a run has {', '.join(order)}: make it "
            "two recipes and two runs"
        )
    unused = [
        f"line {line}: {name} is left out: it says nothing of a modifier"
        for name, line in said.unused
    ]
    own = flattened(said.own)
    stages = own.pop("stages", None) or found.stages
    return Recipe({**found.options, **own}, [*unused, *found.warnings], list(stages))


def with_recipe(command: Command, words: Sequence[str]) -> list[str]:
    """The words of a command line, before them those of the recipe that they name.

    Options that are given win over the recipe's. What is left out is said on stderr.

    Raises:
        InputError: see `read_recipe`; or the recipe is given twice.
    """
    named = [word for word in words if word.partition("=")[0].lstrip("+") == _KEY]
    if not named or _KEY not in command_options(command):
        return list(words)
    if len(named) > 1:
        raise InputError(f"{_KEY}: is given {len(named)} times; give one")
    text = named[0].partition("=")[2].strip("'\"")
    if text in ("", "null"):
        return list(words)
    path = Path(home_expanded(_KEY, text))
    recipe = read_recipe(path)
    known, given = command_options(command), {word.partition("=")[0].lstrip("+") for word in words}
    made, warnings = [], list(recipe.warnings)
    for key, value in _with_stages(recipe).items():
        if key in given:
            continue
        if key in known:
            made.append(f"{key}={_written(value)}")
        elif key != "stages":
            warnings.append(
                f"{key}={_written(value)} is left out: jobs.{command.name} has no such option"
            )
    for line in warnings:
        print(f"warning: {path.name}: {line}", file=sys.stderr, flush=True)
    return [*made, *words]


def _with_stages(recipe: Recipe) -> dict[str, Any]:
    """The options, and the stages: those of the recipe, and what follows every one."""
    wanted = {*recipe.stages, "evaluate", "export", "report"}
    stages = [name for name in STAGES if name in wanted]
    return {"stages": stages, **recipe.options} if recipe.stages else recipe.options


def _written(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, list):
        quoted = ("'" + str(one).replace("\\", "\\\\").replace("'", "\\'") + "'" for one in value)
        return as_list(list(quoted))
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
