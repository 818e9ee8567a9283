"""The text of --help and --version: the docstrings of the schema beside the values of the YAML.

Reads sources with `ast` and YAML as plain data, so that help answers without torch, Ray or Hydra.
"""

from __future__ import annotations

import ast
import platform
import textwrap
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from conf import checks
from jobs.cli.options import CONF_DIR, JOBS, Option, cluster_names, job_options
from sparsify.errors import InputError

_WIDTH = 80

_SUMMARIES = {
    "prune": "Prune a model, recover it, evaluate it, quantize it, export it and report on it.",
    "distill": "Recover the sparse model of run.from by distillation from its dense teacher.",
    "evaluate": "Score the model of run.from on held-out text, against its dense teacher.",
    "quantize": "Quantize the model of run.from and leave every zero where it is.",
    "export": "Write the model of run.from as files to deploy.",
    "tokenize": "Turn training text into a store of token rows, once for many recoveries.",
    "teach": "Sample a dense model's predictions of a token store, once for many recoveries.",
    "pretrain": "Train the small embedded model from scratch.",
}

_FROM = "run.from=runs/first"

_EXAMPLES = {
    "prune": (
        "python -m jobs.prune",
        "python -m jobs.prune prune.pattern=4:8 'prune.baselines=[wanda]'",
        "python -m jobs.prune 'stages=[prune,evaluate]' run.dir=runs/first",
        "python -m jobs.prune +cluster=h100x32 model.path=/models/8b data.train=/data",
        "python -m jobs.prune +cluster=h100x32 --print-config",
    ),
    "distill": (
        f"python -m jobs.distill {_FROM} distill.num_tokens=10_000_000",
        f"python -m jobs.distill {_FROM} --dry-run",
    ),
    "evaluate": (f"python -m jobs.evaluate {_FROM} evaluate.num_tokens=100_000",),
    "quantize": (f"python -m jobs.quantize {_FROM} quantize.method=rtn",),
    "export": (f"python -m jobs.export {_FROM} export.dtype=bfloat16",),
    "tokenize": (
        "python -m jobs.tokenize model.path=/models/8b data.train=/data/text",
        "python -m jobs.tokenize 'data.mix=[7 a.jsonl,3 b.parquet]' tokenize.out=mix",
        "python -m jobs.tokenize data.train=/data/text --dry-run",
    ),
    "teach": (
        "python -m jobs.teach model.path=/models/8b data.train=/data/tokens",
        "python -m jobs.teach data.train=/data/tokens teach.num_samples=64 --dry-run",
    ),
    "pretrain": ("python -m jobs.pretrain out=models/small seed=1",),
}

_TYPE_NAMES = {"list[str]": "list", "str": "text"}

_VERSIONED = ("torch", "transformers", "ray", "deepspeed")


def render(job: str, words: list[str]) -> str:
    """Help of a job as plain text, at most 80 columns wide.

    Args:
        job: one of the jobs.
        words: show only the options whose key contains one of these; empty shows everything.
            `key=value` words are passed over: help may be asked for at the end of any command.

    Raises:
        InputError: no option contains any of the words.
    """
    options = job_options(job)
    wanted = [word for word in words if "=" not in word]
    shown = [o for k, o in options.items() if not wanted or any(word in k for word in wanted)]
    if not shown:
        raise InputError(
            f"--help {' '.join(wanted)}: no option of {job} has such a name; groups are "
            + ", ".join(JOBS[job])
        )
    listing = _option_lines(shown, _defaults(job))
    if wanted:
        return "\n".join(listing).strip("\n")
    lines = [_SUMMARIES[job], "", f"  python -m jobs.{job} {_usage(job)}", "", *_flag_lines()]
    if job != "pretrain":
        lines += ["", *_cluster_lines()]
    if "prune" in JOBS[job]:
        lines += ["", *_method_lines()]
    lines += [*listing, "", "EXAMPLES", *(f"  {line}" for line in _EXAMPLES[job])]
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


def _usage(job: str) -> str:
    words = "[KEY=VALUE]... [FLAG]"
    if job == "pretrain":
        return words
    needed = {"prune": "", "tokenize": "", "teach": "data.train=PATH "}
    required = needed.get(job, "run.from=PATH ")
    return f"{required}[+cluster=NAME] {words}"


def _flag_lines() -> list[str]:
    return [
        "FLAGS",
        "  -h, --help [WORD]  this text, or only the options with WORD in their names",
        "  --print-config     print the resolved config as YAML and stop",
        "  --dry-run          check the options, print what would be done and stop",
        "  --version          print versions and stop",
    ]


def _cluster_lines() -> list[str]:
    lines = ["CLUSTERS (+cluster=NAME; may set options of other groups, see --print-config)"]
    for name in cluster_names():
        described = _yaml(CONF_DIR / "cluster" / f"{name}.yaml")["cluster"]["description"]
        default = " (used when none is named)" if name == "local" else ""
        lines += _wrapped_entry(name, described + default)
    return lines


def _method_lines() -> list[str]:
    lines = ["METHODS (prune.method, prune.baselines)"]
    folder = Path(checks.__file__).parent.parent / "sparsify" / "methods"
    for name in checks.method_names():
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        summary = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        lines += _wrapped_entry(name, summary)
    return lines


def _wrapped_entry(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"{name:<10} {text}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 13
    )


def _option_lines(options: list[Option], defaults: dict[str, Any]) -> list[str]:
    documented = _documentation()
    lines: list[str] = []
    owner = ""
    for option in options:
        if option.owner != owner:
            owner = option.owner
            group = option.key.split(".")[0].upper() if "." in option.key else "OPTIONS"
            lines += ["", *textwrap.wrap(f"{group}: {documented[owner, '']}", _WIDTH)]
        kind = _TYPE_NAMES.get(option.type, option.type) + (" or null" if option.optional else "")
        lines.append(f"  {option.key}={_written(defaults[option.key])}  ({kind})")
        lines += textwrap.wrap(
            documented[option.owner, option.field], _WIDTH,
            initial_indent="      ", subsequent_indent="      ",
        )  # fmt: skip
    return lines


def _documentation() -> dict[tuple[str, str], str]:
    """(class, field) -> the string under the field; (class, '') -> first line of the class."""
    found: dict[tuple[str, str], str] = {}
    spec_file = CONF_DIR.parent / "cluster" / "spec.py"
    for path in (CONF_DIR / "schema.py", *(CONF_DIR / "options").glob("*.py"), spec_file):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if not isinstance(node, ast.ClassDef):
                continue
            found[node.name, ""] = (ast.get_docstring(node) or "").split("\n")[0]
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    found[node.name, field.target.id] = " ".join(str(text.value.value).split())
    return found


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _defaults(job: str) -> dict[str, Any]:
    """Key -> value the job starts from: its YAML over prune.yaml, and the local cluster's."""
    merged: dict[str, Any] = {}
    files = [CONF_DIR / f"{job}.yaml"]
    if job != "pretrain":
        files = [CONF_DIR / "prune.yaml", CONF_DIR / "cluster" / "local.yaml", *files]
    for path in files:
        for key, value in _yaml(path).items():
            if isinstance(value, dict):
                merged |= {f"{key}.{name}": item for name, item in value.items()}
            else:
                merged[key] = value
    return merged


def _written(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return checks.as_list(value)
    if isinstance(value, int) and abs(value) >= 100_000:
        return f"{value:_}"
    text = str(value)
    return f"'{text}'" if set(text) & set(" <>|") else text
