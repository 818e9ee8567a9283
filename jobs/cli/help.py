"""The text of --help and --version: what dataclasses, docstrings and presets say.

Reads sources as text, so that help answers without torch, Ray or Hydra.
"""

from __future__ import annotations

import ast
import platform
import re
import sys
import textwrap
import tomllib
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path

from conf import checks
from jobs.cli.command import Command
from jobs.cli.options import (
    CONF_DIR,
    Option,
    command_options,
    command_presets,
    written,
)
from sparsify.errors import InputError

_WIDTH = 80

_TYPE_NAMES = {"list[str]": "list", "list[int]": "list", "str": "text"}

_VERSIONED = ("torch", "transformers", "ray", "deepspeed")


def render(command: Command, words: list[str]) -> str:
    """Help of a command as plain text, at most 80 columns wide.

    Args:
        command: whose help.
        words: show only the options whose key contains one of these; empty shows everything.
            `key=value` words are passed over: help may be asked for at the end of any command.

    Raises:
        InputError: no option contains any of the words.
    """
    options = command_options(command)
    wanted = [word for word in words if "=" not in word]
    shown = [o for k, o in options.items() if not wanted or any(word in k for word in wanted)]
    if not shown:
        groups = dict.fromkeys(key.split(".")[0] for key in options)
        raise InputError(
            f"--help {' '.join(wanted)}: no option of {command.name} has such a name; groups are "
            + ", ".join(groups)
        )
    listing = _option_lines(_merged(shown))
    if wanted:
        return "\n".join(listing).strip("\n")
    start = f"python -m jobs.{command.name}"
    chosen = "[+cluster=NAME] [GROUP=NAME]... [KEY=VALUE]... [FLAG]..."
    usage = " ".join(f"{command.needs} {chosen}".split())
    lines = textwrap.wrap(command.summary.split("\n\n")[0], _WIDTH)
    lines += ["", *_wrapped(f"{start} {usage}", "  ", "      "), "", *_flag_lines()]
    lines += ["", *_preset_lines(command)]
    if "prune.method" in options:
        lines += ["", *_method_lines()]
    lines += [*listing, "", "EXAMPLES"]
    for example in command.examples:
        lines += _wrapped(f"{start} {example}".rstrip(), "  ", "      ")
    return "\n".join(lines)


def version() -> str:
    """This project's version and those of Python and the packages that decide results."""
    pyproject = CONF_DIR.parent / "pyproject.toml"
    if pyproject.is_file():
        own = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"]
    else:
        own = _installed("twofour")
    packages = ", ".join(f"{name} {_installed(name)}" for name in _VERSIONED)
    return f"twofour {own} (Python {platform.python_version()}, {packages})"


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _flag_lines() -> list[str]:
    return [
        "FLAGS",
        "  -h, --help [WORD]  this text, or only the options with WORD in their names",
        "  --print-config     print the resolved config as YAML and stop",
        "  --dry-run          check options, model and text, say what would be done",
        "  --version          print versions and stop",
        "  -m, --multirun     every combination of values such as run.seed=0,1 in turn,",
        "                     each in its own folder; the same command again resumes;",
        "                     cluster.sweep_jobs=N at the same time; Slurm: one job array",
        "  -cd DIR, -cn NAME  presets in a folder of your own; a config of another name",
        "  --cfg job, --info, --resolve, -sc install=bash, ...: as in every Hydra",
        "                     program, see --hydra-help",
    ]


def _preset_lines(command: Command) -> list[str]:
    lines = ["PRESETS (may set options of any group, see --print-config; options win)"]
    for group, names in command_presets(command).items():
        lines.append(f" {'+' if group == 'cluster' else ''}{group}=")
        for name in names:
            text = (CONF_DIR / group / f"{name}.yaml").read_text(encoding="utf-8")
            found = re.search(r"(?m)^  description: (.*)$", text) or re.search(
                r"(?m)^# ([^@].*)", text
            )
            described = found[1] if found else ""
            default = " (used when none is named)" if name == "local" else ""
            lines += _wrapped_entry(name, described + default)
    return lines


def _method_lines() -> list[str]:
    lines = ["METHODS (prune.method, prune.baselines)"]
    folder = Path(checks.__file__).parent.parent / "sparsify" / "methods"
    for name in checks.METHODS:
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        summary = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        lines += _wrapped_entry(name, summary)
    return lines


def _wrapped_entry(name: str, text: str) -> list[str]:
    return _wrapped(f"{name:<19} {text}", "  ", " " * 22)


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=others,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip


def _merged(options: list[Option]) -> list[Option]:
    """What every stage can be given, once instead of for each, unless one stage was asked for."""
    merged = {re.sub(r"^(cluster\.stages)\.\w+", r"\1.STAGE", o.key): o for o in reversed(options)}
    num_stages = len({o.key.split(".")[2] for o in options if o.key.startswith("cluster.stages.")})
    if num_stages < 2:
        return options
    return [replace(option, key=key) for key, option in reversed(merged.items())]


def _option_lines(options: list[Option]) -> list[str]:
    lines: list[str] = []
    owner: type | None = None
    for option in options:
        if option.owner is not owner:
            owner = option.owner
            group = option.key.split(".")[0].upper() if "." in option.key else "OPTIONS"
            described = (owner.__doc__ or "").split("\n")[0]
            lines += ["", *textwrap.wrap(f"{group}: {described}", _WIDTH)]
        kind = _TYPE_NAMES.get(option.type_name, option.type_name) + (
            " or null" if option.optional else ""
        )
        lines.append(f"  {option.key}={written(option.default)}  ({kind})")
        lines += _wrapped(_help_text(option), " " * 6, " " * 6)
    return lines


def _help_text(option: Option) -> str:
    """The string under an option's field, in its dataclass or in the one that it inherits from."""
    texts = [_texts(owner.__module__) for owner in option.owner.__mro__[:-1]]
    names = [owner.__name__ for owner in option.owner.__mro__[:-1]]
    found = [known.get((name, option.field)) for name, known in zip(names, texts, strict=True)]
    return next(text for text in found if text)


@cache
def _texts(module: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the string under the field."""
    found: dict[tuple[str, str], str] = {}
    tree = ast.parse(Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8"))
    for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[node.name, field.target.id] = " ".join(str(text.value.value).split())
    return found
