"""Which layers a model can do without: rules, one file each, a module that exports RULE."""

from __future__ import annotations

import functools

from sparsify.dropping._base import PARTS, Choice, Rule, Task, Unit
from sparsify.listing import chosen, listed

__all__ = ["PARTS", "Choice", "Rule", "Task", "Unit", "available_rules", "get_rule"]


@functools.cache
def available_rules() -> dict[str, Rule]:
    """Every rule of this folder by its name."""
    return {rule.name: rule for rule in listed(__name__, "RULE")}


def get_rule(name: str) -> Rule:
    """The rule called `name`; InputError that lists those that exist if there is none."""
    return chosen(available_rules(), name, "drop.rule")
