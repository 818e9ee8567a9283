"""Numbers that algorithms take, each with its default, its range and its meaning said once.

Free of torch, so that the options of commands can inherit them (conf/options). `option` writes a
range at a dataclass field; `check_options` holds an instance to it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sparsify.errors import InputError

QUANT_METHODS = ("gptq", "rtn")

PER_CHANNEL = -1
"""group_size of one scale for each output channel, as other quantisers spell it"""

_RENAMED = {
    "resolve": "sparsegpt_refit", "teacher": "sparsegpt_teacher", "descent": "group_descent",
}  # fmt: skip
"""words that options once took -> what they are called now, for the message alone"""

_TERMS = ("kl", "reverse_kl", "ce", "square_head")


def option(default: Any, **rules: Any) -> Any:
    """A dataclass field with what is known of its values.

    Args:
        default: its value unless told otherwise; of a list, every instance gets a copy.
        rules: `low`, `high`, `above`, `below` of a number; `one_of`, the known values (of every
            entry of a list, which then holds each once); `blank=True` where text may be empty;
            `speed_only=True` where it decides memory and speed, and a result by rounding at most;
            `is_path=True` of a file or folder, in which ~ is the user's home.
    """
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=rules)
    return field(default=default, metadata=rules)


def check_options(options: Any, group: str) -> None:
    """Hold every field of a dataclass to its rules; None passes where it is a default.

    Args:
        options: an instance.
        group: name before the field's in messages; '' for none.

    Raises:
        InputError: one line with field, value, rule and fix.
    """
    for item in fields(options):
        value, rules = getattr(options, item.name), dict(item.metadata)
        name = f"{group}.{item.name.rstrip('_')}" if group else item.name
        known = rules.pop("one_of", None)
        is_blank_fine = rules.pop("blank", False)
        for known_elsewhere in ("speed_only", "is_path"):
            rules.pop(known_elsewhere, None)
        if value is None and item.default is None:
            continue
        if isinstance(value, list):
            for entry in value if known else ():
                one_of(name, entry, known)
            if known:
                no_duplicates(name, value)
        elif known:
            one_of(name, value, known)
        elif isinstance(value, str):
            if not value.strip() and not is_blank_fine:
                hint = f" or leave {name} out" if item.default is None else ""
                raise InputError(f"{name}: is empty; give a value{hint}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            in_range(name, value, **rules)


def in_range(
    field: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Require a finite number with `low <= value <= high` and `above < value < below`."""
    wanted = [
        f"{word} {limit:,}" if limit < 2**53 else f"{word} 2**63 - 1"
        for word, limit in (
            ("at least", low), ("more than", above), ("at most", high), ("less than", below),
        )
        if limit is not None
    ]  # fmt: skip
    if not math.isfinite(value):
        raise InputError(f"{field}={value}: must be a finite number, {' and '.join(wanted)}")
    inside = (low is None or value >= low) and (high is None or value <= high)
    strictly = (above is None or value > above) and (below is None or value < below)
    if not (inside and strictly):
        raise InputError(f"{field}={value}: must be {' and '.join(wanted)}")


def one_of(field: str, value: object, known: Sequence[object]) -> None:
    """Require one of the known values."""
    if value not in known:
        words = [str(item) for item in known]
        raise InputError(
            f"{field}={value}: unknown value{close_match(str(value), words)}; "
            f"use one of: {', '.join(words)}"
        )


def no_duplicates(field: str, values: Sequence[str]) -> None:
    """Require every value once."""
    if len(set(values)) != len(values):
        once = as_list(list(dict.fromkeys(values)))
        raise InputError(f"{field}={as_list(values)}: names a value twice; use {once}")


def as_list(values: Sequence[object]) -> str:
    """`values` as a list is written on the command line."""
    return f"[{','.join(map(str, values))}]"


def close_match(text: str, known: Sequence[str]) -> str:
    """' (did you mean X?)' for the known word nearest to `text`, or nothing."""
    if (renamed := _RENAMED.get(text)) in known:
        return f" (it is now called {renamed})"
    close = difflib.get_close_matches(text, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


@dataclass
class PruneParams:
    """Numbers that methods share; a method ignores what its mathematics does not have."""

    damping: float = option(0.01, low=0)
    """share of the Hessian's mean diagonal added to its diagonal; 0 or more"""
    block_size: int = option(128, low=1)
    """columns per lazy update, a multiple of M; with N:M it changes speed only"""
    teacher_share: float = option(1.0, low=0, high=1)
    """how far layers are fitted to the dense model's outputs on its own inputs; 0 to 1"""
    residual_share: float = option(1.0, low=0, high=1)
    """how far layers make up for errors of the residual stream they add to; 0 to 1"""
    refit_iterations: int = option(10, low=0)
    """steps of the conjugate gradients that re-solve the kept weights; 0 for none"""
    descent_sweeps: int = option(3, low=0)
    """sweeps of the descent over groups of columns; 0 for none"""
    admm_iterations: int = option(10, low=0)
    """iterations of the search for a mask in methods admm and twofour"""
    search_precision: str = option("auto", one_of=("auto", "float32", "half"))
    """products of that search: half reads numbers of 11 bits on tensor cores and sums in float32;
    auto is half on a GPU, float32 on a CPU"""

    def __post_init__(self) -> None:
        check_options(self, "prune")

    def searches_in_half(self, on_gpu: bool) -> bool:
        """Whether the search for a mask multiplies in half precision."""
        return self.search_precision == "half" or (self.search_precision == "auto" and on_gpu)


@dataclass
class QuantParams:
    """How to quantise."""

    method: str = option("gptq", one_of=QUANT_METHODS)
    """gptq, or rtn (nearest code, no statistics)"""
    scheme: str = "int4"
    """what weights are rounded to: one file of sparsify/quantization/schemes"""
    group_size: int | None = option(None, low=PER_CHANNEL)
    """columns of a row that share a scale, pruned ones counted; the last group may be short; -1 for
    one scale a channel; null: 128 for int4, 64 for nf4, a quarter of that in rows of fewer than
    eight such groups, and one scale a channel for others"""
    symmetric: bool = True
    """False: a zero point for each group, of int4 and int8"""
    damping: float = option(0.01, low=0)
    """share of the mean Hessian diagonal added to the diagonal"""
    block_size: int = option(128, low=1)
    """columns whose updates are gathered before they reach the columns to the right"""
    num_scale_steps: int = option(32, low=1)
    """scales that are tried per group, of either sign"""
    num_refine_sweeps: int = option(8, low=0)
    """at most this many sweeps of coordinate descent after gptq; 0 gives plain gptq"""
    teacher_share: float = option(0.5, low=0, high=1)
    """how far gptq's target moves towards the outputs of the unquantised model, 0 to 1"""

    def __post_init__(self) -> None:
        check_options(self, "quantize")
        if self.group_size == 0:
            raise InputError(
                "quantize.group_size=0: use a number of columns, -1 for one scale for each output "
                "channel, or null"
            )

    @property
    def has_teacher(self) -> bool:
        """Whether the unquantised model is followed beside the quantised one."""
        return self.method == "gptq" and self.teacher_share > 0


@dataclass
class LossWeights:
    """Weights of the terms of the distillation loss; a term of weight 0 is not computed."""

    kl: float = 1.0
    """weight of KL(teacher || student) per token, >= 0"""
    ce: float = 0.0
    """weight of the next-token cross-entropy, >= 0"""
    square_head: float = 0.0
    """weight of the SquareHead loss between hidden states, >= 0"""
    temperature: float = 1.0
    """divisor of both models' logits in the KL terms, > 0"""
    reverse_kl: float = 0.0
    """weight of KL(student || teacher) per token, >= 0"""

    def __post_init__(self) -> None:
        for name in _TERMS:
            in_range(f"distill.{name}_weight", getattr(self, name), low=0)
        in_range("distill.temperature", self.temperature, above=0)
        if not any(getattr(self, name) for name in _TERMS):
            raise InputError(
                f"distill: {', '.join(f'{name}_weight' for name in _TERMS)} are all 0 at some "
                "moment of the run, nothing to train on; give one of them a weight"
            )

    @property
    def uses_teacher_logits(self) -> bool:
        """Whether a term compares the two models' predictions."""
        return bool(self.kl or self.reverse_kl)


@dataclass(frozen=True)
class Ramp:
    """A straight line from a setting's value at the start of a run to `end`, constant after."""

    end: float
    share: float
    """share of the run after which `end` is reached; over 0, at most 1"""

    def at(self, start: float, progress: float) -> float:
        """The value after the share `progress` of the run, from `start` at 0."""
        return start + (self.end - start) * min(1.0, progress / self.share)


@dataclass(frozen=True)
class LossSchedule:
    """`LossWeights` as a function of how far the run is."""

    start: LossWeights
    ramps: dict[str, Ramp] = field(default_factory=dict)
    """field of LossWeights -> how it changes; the others stay"""

    def __post_init__(self) -> None:
        # Between two of these places every weight is a straight line above zero: if not all are
        # zero at the ends, they are not all zero in between.
        for progress in (0.0, 1.0, *(ramp.share for ramp in self.ramps.values())):
            self.at(progress)

    @classmethod
    def parse(cls, start: LossWeights, texts: Sequence[str]) -> LossSchedule:
        """A schedule from what `distill.schedule` holds: NAME:END@SHARE, one per setting.

        `square_head_weight:0@0.1` takes the weight from its value down to 0 over the first tenth of
        the run.

        Raises:
            InputError: unknown name, a name twice, or numbers out of range.
        """
        names = {f"{name}_weight": name for name in _TERMS} | {"temperature": "temperature"}
        ramps: dict[str, Ramp] = {}
        for text in texts:
            name, _, rest = text.partition(":")
            end, _, share = rest.partition("@")
            try:
                ramp = Ramp(float(end), float(share))
            except ValueError:
                ramp = Ramp(math.nan, math.nan)
            if not (math.isfinite(ramp.end) and 0 < ramp.share <= 1):
                raise InputError(
                    f"distill.schedule: {text!r} is not NAME:END@SHARE with a share of the run "
                    "over 0, at most 1; write for example square_head_weight:0@0.1"
                )
            if name not in names:
                raise InputError(
                    f"distill.schedule: {text!r} names {name!r}; use one of {', '.join(names)}"
                )
            if names[name] in ramps:
                raise InputError(f"distill.schedule: {name} is given twice")
            ramps[names[name]] = ramp
        return cls(start, ramps)

    def at(self, progress: float) -> LossWeights:
        """The weights after the share `progress` of the run, 0 to 1."""
        values = {n: ramp.at(getattr(self.start, n), progress) for n, ramp in self.ramps.items()}
        return replace(self.start, **values)

    def peak(self, name: str) -> float:
        """The largest value that a field of LossWeights takes."""
        start = float(getattr(self.start, name))
        return max(start, self.ramps[name].end) if name in self.ramps else start
