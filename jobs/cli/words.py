"""The words of a command line, checked one by one before Hydra sees them.

A mistake gets one line with the way out; Hydra then gets text as it was typed (007 stays 007, a
path may hold spaces) and numbers of the option's type.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

from jobs.cli.command import Command
from jobs.cli.options import (
    Option,
    command_options,
    command_presets,
    known_option,
    known_preset,
    one_line,
    presets,
)
from sparsify.errors import InputError

_TYPE_WORDS = {
    "int": "a whole number such as 8 or 1_000_000",
    "float": "a number such as 0.5 or 1e-4",
    "bool": "true or false",
    "list[str]": "a list in brackets such as [a,b] or []",
    "list[int]": "a list of whole numbers in brackets such as [1,2] or []",
}

_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def checked_word(command: Command, word: str, folders: Sequence[Path], is_sweep: bool) -> str:
    """A word of the command line in Hydra's grammar, its key known and its value of the type.

    Raises:
        InputError: it can mean nothing.
    """
    key, equals, text = word.partition("=")
    bare = key.lstrip("+~")
    if bare.startswith("hydra.") or set("@/") & set(bare):
        return word
    groups = command_presets(command, folders)
    if not bare or not (equals or key.startswith("~")):
        hint = ""
        if word in command_options(command):
            hint = f"; give it a value: {word}=..."
        elif bare == "cluster":
            hint = f"; write +cluster=NAME with one of: {', '.join(groups['cluster'])}"
        example = command.examples[0].split()[0]
        raise InputError(f"{word}: is not key=value without spaces, such as {example}{hint}")
    if not _KEY.fullmatch(bare):
        raise InputError(f"{word}: {bare!r} is not the name of an option")
    if key.startswith("~"):
        if bare not in groups:
            raise InputError(
                f"{word}: options have defaults and cannot be removed, only presets such as "
                f"~model; leave it out, or set {bare}=null or {bare}=[] where the option allows it"
            )
        return word
    if not text.strip():
        raise InputError(f"{word}: the value is missing; write {key}=VALUE, or leave {key} out")
    if bare == "cluster" and key != "+cluster":
        raise InputError(
            f"{word}: write it with a plus, +{bare}={text}; "
            f"there are: {', '.join(groups['cluster'])}"
        )
    if bare in groups:
        for name in text.split(",") if is_sweep else [text]:
            known_preset(word, name, groups[bare])
        return word if bare not in presets() else f"{bare}={text}"
    if text.startswith("{") and any(k.startswith(f"{bare}.") for k in command_options(command)):
        return word
    option = known_option(command, bare, text)
    if key.startswith("+") and not key.startswith("++"):
        raise InputError(f"{word}: the option exists already; write {bare}={text}")
    if is_sweep:
        with suppress(InputError):  # text that Hydra cannot read is one value
            if _override(key, text).is_sweep_override():
                return word
    return _to_hydra(option, key, text)


def _to_hydra(option: Option, key: str, text: str) -> str:
    """The override with its value checked against the option's type, in Hydra's grammar.

    Text is quoted, so that Hydra keeps it as it was typed. Everything else is parsed here, because
    later `yes` would pass for true.
    """
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if option.type_name == "str" and text != "null" and not quoted:
        escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], text)
        return f'{key}="{escaped}"'
    value = _override(key, text).value()
    if isinstance(value, QuotedString):
        value = value.text
    if _fits(value, option.type_name) or (value is None and option.optional):
        return f"{key}={text}"
    if isinstance(value, float) and option.type_name == "int" and value.is_integer():
        return f"{key}={int(value)}"  # 1e9 is a whole number, spelled shortly
    wanted = _TYPE_WORDS.get(option.type_name, "text") + (" or null" if option.optional else "")
    fix = ""
    if option.type_name.startswith("list") and re.fullmatch(r"[\w.*/,-]+", text):
        fix = f"; write '{key}=[{text}]'"
    elif "," in text:
        fix = "; several values need --multirun"
    raise InputError(f"{key}={text}: must be {wanted}{fix}")


def _fits(value: Any, type_name: str) -> bool:
    if isinstance(value, str) and value.startswith("${"):
        return True  # an interpolation: OmegaConf checks what it becomes
    if type_name == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if type_name == "list[int]":
        return isinstance(value, list) and all(type(item) is int for item in value)
    if type_name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if type_name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, bool if type_name == "bool" else str)


def _override(key: str, text: str) -> Any:
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        override.value()
    except (HydraException, ValueError) as error:
        raise InputError(
            f"{key}={text}: cannot be read ({one_line(error)}); put double quotes around text "
            f"with special signs, such as '{key}=[\"a(b)\"]'"
        ) from error
    return override
