"""Filters of single documents, one file each: a file with a `FILTER` is found by its name.

A filter looks at one document and says what is wrong with it, or nothing; it knows no other
document, so that any worker may judge any of them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache

from conf.options.curate import CurateConfig
from jobs.curation.filters._base import Against, Filter, Judge
from sparsify.errors import InputError
from sparsify.listing import module_names
from sparsify.params import as_list, close_match


@cache
def filter_names() -> tuple[str, ...]:
    """Every filter there is."""
    return tuple(module_names(__name__))


def _has_lengths(config: CurateConfig) -> bool:
    limits = (config.min_chars, config.max_chars, config.min_words, config.max_words)
    return any(limit is not None for limit in limits)


_BY_OPTION: dict[str, Callable[[CurateConfig], bool]] = {
    "length": _has_lengths,
    "language": lambda config: bool(config.languages),
    "overlap": lambda config: bool(config.against),
}
"""Filters with options of their own -> whether these ask for it; curate.quality names others"""


def find_filter(name: str) -> Filter:
    """The filter of `filters/<name>.py`; a package that it needs is imported now.

    Raises:
        InputError: that package is not installed.
    """
    try:
        found: Filter = importlib.import_module(f"{__name__}.{name}").FILTER
    except ModuleNotFoundError as error:
        raise InputError(
            f"curate: the filter {name} needs the package {error.name}, which is not installed; "
            "pip install 'twofour[curate]'"
        ) from None
    return found


def make_judges(config: CurateConfig, against: Against | None) -> list[tuple[str, Judge]]:
    """(name, judge) of every filter that is on, cheap ones first.

    Args:
        config: what is asked for.
        against: of evaluation texts, for the filter `overlap`.

    Raises:
        InputError: an unknown rule, limit or language; a package that is not installed.
    """
    named = [name for name in filter_names() if name not in _BY_OPTION]
    for name in config.quality:
        if name not in named:
            raise InputError(
                f"curate.quality={as_list(config.quality)}: no rules {name!r}"
                f"{close_match(name, named)}; there are: {', '.join(named)}"
            )
    on = [name for name, asks in _BY_OPTION.items() if asks(config)] + config.quality
    found = {name: find_filter(name) for name in on}
    limits = _limits(config, found)
    order = sorted(found, key=lambda name: (found[name].cost, name))
    return [
        (name, found[name].make(config, {**found[name].limits, **limits.get(name, {})}, against))
        for name in order
    ]


def _limits(config: CurateConfig, found: dict[str, Filter]) -> dict[str, dict[str, float | None]]:
    """Filter -> rule -> limit, of what curate.limits says otherwise."""
    known = [f"{name}.{rule}" for name, one in found.items() for rule in one.limits]
    limits: dict[str, dict[str, float | None]] = {}
    for entry in config.limits:
        rule, _, text = entry.strip().partition(" ")
        where = f"curate.limits={as_list(config.limits)}: entry '{entry}'"
        if rule not in known:
            there = ", ".join(known) or "none, as curate.quality is empty"
            raise InputError(
                f"{where}: no such rule{close_match(rule, known)}; of what is on there are: {there}"
            )
        try:
            value = None if text.strip() == "off" else float(text)
        except ValueError:
            value = math.nan
        if value is not None and not math.isfinite(value):
            raise InputError(f"{where}: must be a rule, a space, and a number or off")
        name, _, inner = rule.partition(".")
        limits.setdefault(name, {})[inner] = value
    return limits
