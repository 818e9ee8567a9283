"""A modifier's arguments, taken one by one, so that none is left over unseen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.cli.recipe.text import Modifier
from sparsify.errors import InputError
from sparsify.params import close_match


@dataclass
class Found:
    """What a recipe comes to."""

    options: dict[str, Any] = field(default_factory=dict)
    """key -> value, as a command line would set them"""
    warnings: list[str] = field(default_factory=list)
    """what is left out, a line each"""
    stages: list[str] = field(default_factory=list)
    """in the order in which the recipe has them"""

    def set(self, key: str, value: Any, where: str) -> None:
        """Enter an option; InputError where the recipe has set it to something else."""
        if key in self.options and self.options[key] != value:
            raise InputError(
                f"{where}: {key}={value} where the recipe said {key}={self.options[key]} before; "
                "make it two recipes and two runs"
            )
        self.options[key] = value

    def add_stage(self, name: str, where: str) -> None:
        """Enter a stage; InputError where another came between."""
        if name in self.stages and self.stages[-1] != name:
            raise InputError(
                f"{where}: {name} comes again after {self.stages[-1]}; make it one run for each "
                "round, the later with run.from= and prune.existing=extend"
            )
        if name not in self.stages:
            self.stages.append(name)


class Args:
    """Those of one modifier.

    Args:
        modifier: with its lines.
        found: where warnings go.
    """

    def __init__(self, modifier: Modifier, found: Found) -> None:
        self._modifier = modifier
        self._left = dict(modifier.args)
        self._known: list[str] = []
        self.found = found

    def where(self, key: str | None = None) -> str:
        """The place of a key, or of the modifier, for messages."""
        line = self._modifier.args.lines.get(key or "", self._modifier.line)
        name = self._modifier.name
        return f"line {line}: {name if key is None else f'{name}.{key}'}"

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as seen."""
        self._known.append(key)
        return self._left.pop(key, default)

    def number(self, *keys: str) -> float | None:
        """The number under the first of these keys that is there; 8e-5 too, which YAML takes for
        text."""
        for key in keys:
            value = self.take(key)
            if value is None:
                continue
            try:
                if isinstance(value, bool):
                    raise ValueError
                return float(value)
            except (TypeError, ValueError):
                raise InputError(f"{self.where(key)} is {value!r}, not a number") from None
        return None

    def set_number(self, option: str, *keys: str, whole: bool = False) -> None:
        """An option from a number, where there is one."""
        value = self.number(*keys)
        if value is not None:
            self.set(option, int(value) if whole else value, keys[0])

    def set(self, option: str, value: Any, key: str | None = None) -> None:
        """See `Found.set`."""
        self.found.set(option, value, self.where(key))

    def drop(self, why: str, *keys: str) -> None:
        """Leave keys out, with a line each that says why."""
        for key in keys:
            value = self.take(key)
            if value not in (None, {}, []):
                self.found.warnings.append(f"{self.where(key)}={value!r} is left out: {why}")

    def refuse(self, why: str, *keys: str) -> None:
        """Refuse keys that say anything; null, false, 0 and nothing are fine."""
        for key in keys:
            value = self.take(key)
            if value:
                raise InputError(f"{self.where(key)}={value!r}: {why}")

    def only(self, key: str, allowed: Sequence[Any], why: str) -> Any:
        """The value of a key, one of a few."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise InputError(f"{self.where(key)}={value!r}: {why}")
        return value

    def done(self) -> None:
        """Refuse what is left."""
        for key in self._left:
            raise InputError(
                f"{self.where(key)}: unknown key{close_match(key, self._known)}; nothing is "
                "ignored unseen: remove it, or say it with an option"
            )
