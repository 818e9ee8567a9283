"""Which layers a model can do without: rules, one file each.

The folder is listed, not a registry kept by hand; an import error of a rule is not hidden.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from sparsify.dropping._base import PARTS, Choice, Rule, Task, Unit
from sparsify.errors import InputError
from sparsify.params import close_match

__all__ = ["PARTS", "Choice", "Rule", "Task", "Unit", "available_rules", "get_rule"]


@functools.cache
def available_rules() -> dict[str, Rule]:
    """Every rule of this folder by its name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}")
               for name in names if not name.startswith("_")]  # fmt: skip
    return {module.RULE.name: module.RULE for module in modules}


def get_rule(name: str) -> Rule:
    """The rule called `name`.

    Raises:
        InputError: there is none; the message lists those that exist.
    """
    rules = available_rules()
    if name not in rules:
        hint = close_match(name, list(rules))
        raise InputError(f"rule {name!r} does not exist{hint}; choose from {', '.join(rules)}")
    return rules[name]
