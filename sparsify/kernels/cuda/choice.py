"""Which way is taken for how many tokens: measured once for a shape on a card, and kept in a file.

Up to 16 tokens it is always `decode`. Beyond, times of every way at some numbers of tokens decide;
what measures is given by the caller (`card`), and so is the folder. A layer may hold one copy
beside its packed tensors if it is allowed to; without one, some numbers of tokens may be slower
than a dense layer's, which the table then says.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.errors import InputError
from sparsify.files import readable, write_json
from sparsify.kernels.cuda.layout import Prepared
from sparsify.kernels.cuda.ways import WAYS, Problem, Way

FEW_TOKENS = 16
"""up to here it is `decode`"""

TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""at which ways are measured; any other number counts as the next larger one, or the last"""

_PLAIN = {"decode", "expand"}
"""they hold no copy, so that no card is without them"""

_DEFAULT = {64: "decode", TOKENS[-1]: "expand"}
"""without a choice"""

Measure = Callable[[Callable[[], object]], float]
"""Seconds that one call takes: warm, alone on the card, the median of several"""


@dataclass(frozen=True)
class Choice:
    """What was measured of a problem, and what follows."""

    times_s: dict[int, dict[str, float]]
    """tokens -> way -> seconds"""
    ways: dict[int, str]
    """tokens -> the way that is taken"""
    copy: str | None
    """the way whose copy the layer holds"""

    def way(self, num_tokens: int) -> str:
        """Which way this many tokens take."""
        return _at(self.ways, num_tokens)

    @property
    def slower_than_dense(self) -> dict[int, float]:
        """Tokens -> time over dense's, where no copy was allowed and it is above 1."""
        ratios = {
            tokens: self.times_s[tokens][way] / self.times_s[tokens].get("dense", math.inf)
            for tokens, way in self.ways.items()
        }
        return {tokens: ratio for tokens, ratio in ratios.items() if ratio > 1}


def choose(
    times_s: Mapping[int, Mapping[str, float]], may_copy: bool, may_round: bool = False,
    ways: Mapping[str, Way] = WAYS,
) -> Choice:  # fmt: skip
    """The fastest way at each number of tokens.

    Args:
        times_s: tokens -> way -> seconds; a way without a copy is always among them.
        may_copy: hold one more copy of the weight. The copy is then the one with the best mean of
            logarithms over the numbers of tokens, among those that are nowhere slower than dense.
        may_round: take ways that round the inputs.
        ways: what the names mean.
    """
    allowed = [name for name in next(iter(times_s.values())) if may_round or ways[name].is_exact]
    plain = [name for name in allowed if ways[name].copy is None]
    options: list[str | None] = [None]
    if may_copy:
        options += [name for name in allowed if ways[name].copy is not None]
    found: list[tuple[float, Choice]] = []
    for copy in options:
        names = [*plain, copy] if copy else plain
        chosen = {
            tokens: min(names, key=lambda name: (times[name], name))
            for tokens, times in times_s.items()
        }
        choice = Choice({t: dict(times) for t, times in times_s.items()}, chosen, copy)
        if may_copy and choice.slower_than_dense:
            continue
        score = sum(math.log(times_s[tokens][way]) for tokens, way in chosen.items())
        found.append((score, choice))
    return min(found, key=lambda pair: pair[0])[1]


def measure_ways(
    problem: Problem, prepared: Prepared, seconds: Measure, make_inputs: Callable[[int], Tensor],
    ways: Mapping[str, Way] = WAYS, tokens: tuple[int, ...] = TOKENS,
) -> dict[int, dict[str, float]]:  # fmt: skip
    """Seconds of each way that this machine has, at each number of tokens.

    Args:
        prepared: the packed weight.
        seconds: measures a call.
        make_inputs: number of tokens -> inputs (T, I).

    Cost: memory of one more copy at a time; the time of the calls. A way with a copy that fails,
    for want of memory or of support for the shape, is left out with a warning.
    """
    times_s: dict[int, dict[str, float]] = {number: {} for number in tokens}
    for name, way in ways.items():
        if not way.takes(problem):
            continue
        found: dict[int, float] = {}
        try:
            copies = [] if way.copy is None else way.copy(problem, prepared)
            for number in tokens:
                call = _bound(way, problem, make_inputs(number), prepared, copies)
                found[number] = seconds(call)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if way.copy is None:
                raise
            reason = str(error).split("\n")[0]
            text = f"{problem.name}: {name} is not among the ways of this card ({reason})"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            continue
        for number, taken_s in found.items():
            times_s[number][name] = taken_s
    return times_s


def _bound(
    way: Way, problem: Problem, inputs_TI: Tensor, prepared: Prepared, copies: list[Tensor]
) -> Callable[[], Tensor]:
    return lambda: way.run(problem, inputs_TI, prepared, None, copies)


@dataclass
class Choices:
    """All choices of one card, in memory and in a file.

    Args:
        folder: where the file is; None keeps nothing.
        card: the card's name, such as torch.cuda.get_device_name() gives it.
        versions: of what decides the times, such as {"torch": ...}; another one measures again.
        may_copy, may_round: see `choose`.
    """

    folder: Path | None
    card: str
    versions: dict[str, str]
    may_copy: bool = False
    may_round: bool = False
    found: dict[str, Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is not None and self.file.exists():
            self._read()

    @property
    def file(self) -> Path:
        """Of this card."""
        assert self.folder is not None, "choices without a folder have no file"
        return self.folder / f"choices-{re.sub(r'[^A-Za-z0-9]+', '-', self.card).lower()}.json"

    def get(
        self, problem: Problem, times: Callable[[], Mapping[int, Mapping[str, float]]]
    ) -> Choice:
        """The choice for a problem; `times` measures it where it has not been measured.

        Where the file cannot be written, a warning says so once and times stay in memory.
        """
        if problem.name not in self.found:
            self.found[problem.name] = choose(times(), self.may_copy, self.may_round)
            if self.folder is not None:
                self._write()
        return self.found[problem.name]

    def way(self, problem: Problem, num_tokens: int) -> str:
        """The way that so many tokens take, measured or not."""
        if num_tokens <= FEW_TOKENS:
            return "decode"
        choice = self.found.get(problem.name)
        return _at(_DEFAULT, num_tokens) if choice is None else choice.way(num_tokens)

    def rows(self) -> list[tuple[str, int, str, float, float]]:
        """(problem, tokens, way, seconds, time of dense over it or NaN without one)."""
        return [
            (name, tokens, way, choice.times_s[tokens][way],
             choice.times_s[tokens].get("dense", math.nan) / choice.times_s[tokens][way])
            for name, choice in sorted(self.found.items())
            for tokens, way in sorted(choice.ways.items())
        ]  # fmt: skip

    def _about(self) -> dict[str, Any]:
        return {"card": self.card, "versions": self.versions}

    def _read(self) -> None:
        with readable(f"choices {self.file}"):
            content = self.file.read_bytes()
        try:
            given = json.loads(content)
            if {"card": given["card"], "versions": given["versions"]} != self._about():
                return  # other software: other times
            for name, times in given["times_s"].items():
                times_s = {int(n): {w: float(s) for w, s in at.items()} for n, at in times.items()}
                if not all(_PLAIN <= at.keys() <= WAYS.keys() for at in times_s.values()):
                    raise ValueError(f"ways of {name}")
                self.found[name] = choose(times_s, self.may_copy, self.may_round)
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            raise InputError(
                f"choices {self.file}: damaged ({type(error).__name__}); delete the file, and "
                "ways are measured again"
            ) from None

    def _write(self) -> None:
        times = {name: choice.times_s for name, choice in sorted(self.found.items())}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {**self._about(), "times_s": times})
        except OSError as error:
            warnings.warn(
                f"choices {self.file}: cannot be written ({error.strerror}); ways are measured "
                "again by every process until use_card names another folder",
                RuntimeWarning,
                stacklevel=2,
            )
            self.folder = None


def _at(by_tokens: Mapping[int, str], num_tokens: int) -> str:
    """The entry of the next larger number of tokens, or of the largest."""
    numbers = sorted(by_tokens)
    return by_tokens[next((n for n in numbers if n >= num_tokens), numbers[-1])]


class _Used:
    """The choices of this process."""

    choices = Choices(None, "", {})


def use(choices: Choices) -> None:
    """Let layers go the ways that were chosen."""
    _Used.choices = choices


def used() -> Choices:
    """What layers go by: nothing measured, until `use`."""
    return _Used.choices
