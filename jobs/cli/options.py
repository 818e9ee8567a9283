"""The options of every job, read off the schema, and what a command line may say about them.

Owns syntax: which words are options, which keys exist for a job, what type a key takes. Knows
nothing of Hydra; importing it costs milliseconds, so that help and most mistakes answer at once.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

from conf import schema
from conf.options.pretrain import PretrainConfig
from conf.options.teach import TeachJobConfig
from conf.options.tokenize import TokenizeJobConfig
from conf.schema import Config, written_name
from sparsify.errors import InputError

CONF_DIR = Path(schema.__file__).parent

_SHARED = ("run", "model", "data", "prune.pattern", "prune.skip")

JOBS: dict[str, tuple[str, ...]] = {
    "prune": tuple(field.name for field in fields(Config)),
    "distill": (*_SHARED, "distill", "tracker", "cluster"),
    "evaluate": (*_SHARED, "evaluate", "tracker", "cluster"),
    "quantize": (*_SHARED, "quantize", "evaluate", "tracker", "cluster"),
    "export": ("run", "model", "prune.pattern", "prune.skip", "export", "tracker", "cluster"),
    "tokenize": (
        "model.path", "data.train", "data.mix", "data.calibration", "data.heldout",
        "data.text_field", "data.separator", "data.heldout_share", "data.sequence_length",
        "tokenize", "cluster",
    ),
    "teach": (
        "model.path", "model.dtype", "data.train", "data.isolate_documents", "teach", "cluster",
    ),
    "pretrain": tuple(field.name for field in fields(PretrainConfig)),
}  # fmt: skip
"""Job -> the groups and single options it uses; all others are refused on its command line."""

_SCHEMAS = {
    "pretrain": PretrainConfig, "tokenize": TokenizeJobConfig, "teach": TeachJobConfig,
}  # fmt: skip


def config_class(
    job: str,
) -> type[Config] | type[PretrainConfig] | type[TokenizeJobConfig] | type[TeachJobConfig]:
    """The dataclass of a job's whole config."""
    return _SCHEMAS.get(job, Config)


@dataclass(frozen=True)
class Option:
    """One `key=value` that a command line may set."""

    key: str
    """dotted name as people write it"""
    type: str
    """int, float, bool, str or list[str]"""
    optional: bool
    """whether null is a value"""
    owner: str
    """name of the dataclass that holds the field"""
    field: str
    """name of the field there"""


@dataclass(frozen=True)
class Override:
    """One `key=value` of a command line, its key known to exist."""

    option: Option
    text: str
    """the value as written"""


def _walk(config_class: type, prefix: str = "") -> dict[str, Option]:
    found: dict[str, Option] = {}
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        key = prefix + written_name(item.name)
        if is_dataclass(hints[item.name]):
            found |= _walk(hints[item.name], f"{key}.")
        else:
            type_name = str(item.type)
            optional = type_name.endswith(" | None")
            found[key] = Option(
                key, type_name.removesuffix(" | None"), optional, config_class.__name__, item.name
            )
    return found


@cache
def job_options(job: str) -> dict[str, Option]:
    """Every option of a job by its key, in the order of the schema."""
    every = _walk(config_class(job))
    used = JOBS[job]
    return {k: o for k, o in every.items() if k in used or k.split(".")[0] in used}


def cluster_names() -> list[str]:
    """Names that `+cluster=` takes: the files of conf/cluster."""
    return sorted(path.stem for path in (CONF_DIR / "cluster").glob("*.yaml"))


def parse_overrides(job: str, words: list[str]) -> tuple[str | None, list[Override]]:
    """The cluster named by `+cluster=NAME` (None: not named) and the other overrides, in order.

    Raises:
        InputError: a word that is not `key=value`, or a key or cluster that does not exist.
    """
    cluster: str | None = None
    overrides: list[Override] = []
    for word in words:
        key, text = _split(job, word)
        if key == "+cluster":
            if cluster is not None:
                raise InputError(f"{word}: +cluster is given twice; a run has one cluster")
            cluster = _known_cluster(job, text)
        else:
            overrides.append(Override(_known_option(job, key, text), text))
    return cluster, overrides


def _split(job: str, word: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    bare = key.lstrip("+~")
    examples = {
        "pretrain": "seed=1", "tokenize": "tokenize.out=runs/tokens",
        "teach": "teach.out=runs/teacher",
    }  # fmt: skip
    example = examples.get(job, "run.dir=runs/first")
    if key.startswith("~"):
        raise InputError(
            f"{word}: options cannot be removed; set {bare}=null or {bare}=[] where the option "
            "allows it"
        )
    if not equals or not bare:
        hint = ""
        if word in job_options(job):
            hint = f"; give it a value: {word}=..."
        elif word.lstrip("+") == "cluster":
            hint = f"; write +cluster=NAME with one of: {', '.join(cluster_names())}"
        raise InputError(f"{word}: is not key=value without spaces, such as {example}{hint}")
    if not re.fullmatch(r"(\+\+?)?[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*", key):
        raise InputError(f"{word}: {key!r} is not the name of an option; write {example}")
    if key.startswith("+") and key != "+cluster":
        raise InputError(
            f"{word}: only +cluster=NAME takes a plus, every other option exists already; "
            f"write {bare}={text}"
        )
    if not text.strip():
        raise InputError(f"{word}: the value is missing; write {key}=VALUE, or leave {key} out")
    return key, text


def _known_cluster(job: str, name: str) -> str:
    if job == "pretrain":
        raise InputError(f"+cluster={name}: pretrain runs in one process and takes no cluster")
    names = cluster_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise InputError(
            f"+cluster={name}: no such cluster{f' (did you mean {close[0]}?)' if close else ''}; "
            f"there are: {', '.join(names)}"
        )
    return name


def _known_option(job: str, key: str, text: str) -> Option:
    options = job_options(job)
    if key in options:
        return options[key]
    if key == "cluster" and job != "pretrain":
        raise InputError(
            f"cluster={text}: write it with a plus, +cluster={text}; "
            f"there are: {', '.join(cluster_names())}"
        )
    if any(known.startswith(f"{key}.") for known in options):
        first = next(known for known in options if known.startswith(f"{key}."))
        raise InputError(
            f"{key}={text}: {key} is a group of options; set one of them, such as {first}=..."
        )
    if job != "pretrain" and key in job_options("prune"):
        raise InputError(f"{key}: {_unused(job, key)}")
    raise InputError(f"{key}: unknown option{_matches(key, list(options))}; {_level(key, options)}")


def _unused(job: str, key: str) -> str:
    if key == "stages":
        return (
            f"jobs.{job} runs its one stage; for several use "
            "python -m jobs.prune 'stages=[...]' run.from=..."
        )
    groups = ", ".join(JOBS[job])
    return f"is not used by jobs.{job}, which takes: {groups}"


def _matches(key: str, known: list[str]) -> str:
    leaf = key.rsplit(".", 1)[-1]
    close = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    close += difflib.get_close_matches(key, known, n=3, cutoff=0.7)
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    close += [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    close = list(dict.fromkeys(close))[:3]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _level(key: str, options: dict[str, Option]) -> str:
    """The names that exist where `key` was looked for."""
    parts = key.split(".")
    if key.rpartition(".")[0] in options:
        return f"{key.rpartition('.')[0]} is a value and has no options of its own"
    inside = [k.split(".")[1] for k in options if k.startswith(f"{parts[0]}.")]
    if inside and len(parts) > 1:
        return f"options of {parts[0]}: {', '.join(inside)}"
    tops = dict.fromkeys(k.split(".")[0] + (".*" if "." in k else "") for k in options)
    return f"there are: {', '.join(tops)}"
