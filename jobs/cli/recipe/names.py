"""Layers as recipes name them (names, `re:` patterns, classes) and as options do (globs)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from sparsify.errors import InputError

_ALL = ("Linear", "__ALL__", "__ALL_PRUNABLE__")

_BLOCK = r"re:(\^?(\.\*)?(model\\?\.)?(decoder\\?\.)?layers\\?\.(\\d\+|\[0-9\]\+|\.\*)\$?)"

_OUTSIDE = re.compile(r"(.*\.)?(lm_head|embed_out|embed_tokens|wte|wpe|norm|ln_f)")

_CLASS = re.compile(r"[A-Z][A-Za-z0-9]*")

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""linear layers of a block in the families that recipes are written for"""

_TOKEN = re.compile(r"\\(?P<literal>[.\-_/])|(?P<any>\.\*)|(?P<one>\.)|(?P<plain>[\w\-]+)")


def are_all(targets: object) -> bool:
    """Whether targets are all linear layers of the blocks."""
    listed = _listed(targets)
    if any(target in _ALL or re.fullmatch(_BLOCK, target) for target in listed):
        return True
    return {_projection(target) for target in listed} >= set(PROJECTIONS)


def skip_of(ignore: object, targets: object, where: str) -> list[str]:
    """Globs of the layers that are left out.

    Args:
        ignore: what the recipe says to leave out; layers outside the blocks, and classes of
            modules that are no linear layers, are left out anyway.
        targets: what it says to take.
        where: for messages.

    Raises:
        InputError: a pattern that no glob says, or targets that are a part of the layers by names
            other than Llama's.
    """
    found = [glob for name in _listed(ignore) for glob in _globs(name, where)]
    if targets is None or are_all(targets):
        return found
    taken = {_projection(target) for target in _listed(targets)}
    if None in taken:
        raise InputError(
            f"{where}: targets {targets!r} are neither all linear layers nor some of "
            f"{', '.join(PROJECTIONS)}; say what is left out with ignore"
        )
    return found + [f"*.{name}" for name in PROJECTIONS if name not in taken]


def _listed(value: object) -> list[str]:
    if value is None:
        return []
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def _projection(target: str) -> str | None:
    """The one projection that a target means in every block."""
    match = re.fullmatch(r"re:\^?\.\*\\?\.?(\w+?_proj)(\\?\.weight)?\$?", target)
    return match[1] if match and match[1] in PROJECTIONS else None


def _globs(name: str, where: str) -> list[str]:
    """Globs of one entry of `ignore`."""
    plain = name.removeprefix("re:")
    if name != plain:
        core = plain.removeprefix("^").removeprefix(".*").removesuffix("$").removesuffix(".*")
        if _OUTSIDE.fullmatch(core.replace("\\", "")):
            return []
        return globs_of(plain, where)
    if name in _ALL:
        raise InputError(f"{where}: ignore leaves out {name!r}, which is every layer")
    if _CLASS.fullmatch(name) or _OUTSIDE.fullmatch(name):
        return []
    return ["".join(f"[{c}]" if c in "*?[" else c for c in name.removesuffix(".weight"))]


def globs_of(pattern: str, where: str) -> list[str]:
    """Globs that together match what a regular expression does, from a name's start on.

    Raises:
        InputError: it has more than names, `.`, `.*` and choices `(a|b)`.
    """
    is_whole = pattern.endswith("$") and not pattern.endswith("\\$")
    text = pattern.removeprefix("^").removesuffix("$")
    text = re.sub(r"\\?\.weight$", "", text)
    choices = []
    for part in re.split(r"(\((?:\?:)?[^()]*\))", text):
        group = re.fullmatch(r"\((?:\?:)?([^()]*)\)", part)
        choices.append(
            [_glob(one, pattern, where) for one in (group[1].split("|") if group else [part])]
        )
    end = (
        ""
        if is_whole or text.endswith(".*") or text != re.sub(r"\\?\.weight$", "", pattern)
        else "*"
    )
    return ["".join(parts) + end for parts in itertools.product(*choices)]


def _glob(text: str, pattern: str, where: str) -> str:
    found, place = "", 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise InputError(
                f"{where}: no glob says what re:{pattern} does (names, '.', '.*' and choices "
                "'(a|b)' can be said); give prune.skip or quantize.skip on the command line"
            )
        place = match.end()
        found += {"any": "*", "one": "?"}.get(match.lastgroup or "", match["literal"] or match[0])
    return found


def regex_of(glob: str) -> str:
    """A glob as recipes say it: a name, or `re:` with a regular expression of the whole name."""
    if not set(glob) & set("*?["):
        return glob
    parts = re.split(r"(\*|\?|\[[^\]]\])", glob)
    said = {"*": ".*", "?": "."}
    found = [said.get(part) or re.escape(part[1] if re.fullmatch(r"\[.\]", part) else part)
             for part in parts if part]  # fmt: skip
    return f"re:{''.join(found)}$"


def merged(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Both, each once."""
    return list(dict.fromkeys([*first, *second]))
