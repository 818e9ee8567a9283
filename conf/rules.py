"""Rules of the options: each function passes or raises one line with field, value, rule and fix."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sparsify
from sparsify.errors import InputError

if TYPE_CHECKING:
    from cluster.spec import ClusterSpec
    from conf.stages import DistillConfig
    from sparsify.loss_terms import LossSchedule

DTYPES = ("float32", "bfloat16", "float16")


def method_names() -> tuple[str, ...]:
    """Pruning methods that exist: the modules of `sparsify/methods`, listed without importing."""
    folder = Path(sparsify.__path__[0]) / "methods"
    return tuple(sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")))


def as_list(values: Sequence[object]) -> str:
    """`values` as a list is written on the command line."""
    return f"[{','.join(map(str, values))}]"


def close_match(text: str, known: Sequence[str]) -> str:
    """' (did you mean X?)' for the known word nearest to `text`, or nothing."""
    close = difflib.get_close_matches(text, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


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


def not_blank(field: str, value: str | None, optional: bool = False) -> None:
    """Require text that is more than spaces; None passes where the option is optional."""
    if value is None and optional:
        return
    if not value or not value.strip():
        hint = f"; give a value or leave {field} out" if optional else "; give a value"
        raise InputError(f"{field}: is empty{hint}")


def no_duplicates(field: str, values: Sequence[str]) -> None:
    """Require every value once."""
    if len(set(values)) != len(values):
        once = as_list(list(dict.fromkeys(values)))
        raise InputError(f"{field}={as_list(values)}: names a value twice; use {once}")


def parse_mix(field: str, entries: Sequence[str]) -> list[tuple[float, str]]:
    """(share, source) of every entry `WEIGHT SOURCE`; the shares are weights over their sum."""
    mix: list[tuple[float, str]] = []
    for entry in entries:
        weight, _, source = entry.strip().partition(" ")
        source = source.strip()
        where = f"{field}={as_list(entries)}: entry '{entry}'"
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not source or not math.isfinite(value) or value <= 0:
            raise InputError(
                f"{where}: must be a weight over 0, a space and a source; write it like "
                f"'{field}=[0.7 stdlib,0.3 books.txt]'"
            )
        if source in (known for _, known in mix):
            raise InputError(f"{where}: names {source} a second time; add up its weights")
        mix.append((value, source))
    total = sum(weight for weight, _ in mix)
    return [(weight / total, source) for weight, source in mix]


def budget_syntax(field: str, text: str | None) -> None:
    """Require size:S or latency:S with 0 < S < 1, or nothing."""
    if text is None:
        return
    kind, _, share = text.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if kind not in ("size", "latency") or not 0 < value < 1:
        raise InputError(
            f"{field}={text}: use size:S or latency:S with a share S between 0 and 1, such as "
            "size:0.7, or null"
        )


def pattern_syntax(field: str, text: str) -> None:
    """Require N:M with 1 <= N < M, or unstructured:S with 0 < S < 1."""
    form = "use N:M such as 2:4, 4:8 or 1:2, or unstructured:0.5 (share of zeros)"
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if not 1 <= n < m:
            raise InputError(
                f"{field}={text}: N:M keeps N of every M weights, so 1 <= N < M; {form}"
            )
        return
    if match := re.fullmatch(r"unstructured:(\d*\.?\d+)", text):
        if not 0 < float(match[1]) < 1:
            raise InputError(f"{field}={text}: the share of zeros must be between 0 and 1; {form}")
        return
    raise InputError(f"{field}={text}: not a pattern; {form}")


def block_fits_pattern(block_size: int, pattern: str) -> None:
    """Require whole N:M groups in every block of columns."""
    if pattern.startswith("unstructured"):
        return
    m = int(pattern.split(":")[1])
    if block_size % m:
        raise InputError(
            f"prune.block_size={block_size}: must be a multiple of {m}, the group length of "
            f"prune.pattern={pattern}; use {nearest_multiples(block_size, m)}"
        )


def nearest_multiples(value: int, unit: int) -> str:
    """The positive multiples of `unit` on either side of `value`, as 'A or B'."""
    below = value // unit * unit
    return " or ".join(str(v) for v in (below, below + unit) if v > 0)


def stages_in_order(stages: Sequence[str], known: Sequence[str]) -> None:
    """Require at least one stage, each known, each once, in the order in which stages run."""
    order = f"stages run in this order: {', '.join(known)}"
    if not stages:
        raise InputError(f"stages=[]: nothing to do; name at least one; {order}")
    for name in stages:
        if name not in known:
            raise InputError(
                f"stages={as_list(stages)}: unknown stage {name!r}{close_match(name, known)}; "
                f"{order}"
            )
    no_duplicates("stages", stages)
    wanted = [name for name in known if name in stages]
    if list(stages) != wanted:
        raise InputError(f"stages={as_list(stages)}: out of order; use stages={as_list(wanted)}")


def starts_from_something(stages: Sequence[str], from_: str | None) -> None:
    """Require run.from where no stage of the run makes the sparse model."""
    if "prune" not in stages and from_ is None:
        raise InputError(
            f"run.from: is required because stages={as_list(stages)} does not start with prune; "
            "give an earlier run or a model folder, for example "
            "run.from=runs/embedded-2-4-twofour"
        )


def redo_within_stages(redo: Sequence[str], stages: Sequence[str]) -> None:
    """Require that stages to redo are stages of this run."""
    for name in redo:
        if name != "all" and name not in stages:
            raise InputError(
                f"run.redo={as_list(redo)}: {name!r} is not a stage of this run; "
                f"use some of {', '.join(stages)}, or all"
            )


def half_needs_gpu(dtype: str, cluster: ClusterSpec) -> None:
    """Refuse float16 on CPU workers: its range overflows in the sums that the CPU keeps in it."""
    if dtype == "float16" and not cluster.uses_gpu:
        raise InputError(
            f"model.dtype=float16: needs GPUs and cluster {cluster.name!r} has none; "
            "use model.dtype=bfloat16 or float32, or a GPU cluster such as +cluster=h100x8"
        )


def batch_fits_workers(distill: DistillConfig, num_workers: int) -> None:
    """Require that a step splits into equal micro-batches on every worker."""
    unit = distill.micro_batch_size * num_workers
    if distill.batch_size % unit:
        raise InputError(
            f"distill.batch_size={distill.batch_size}: must be a multiple of {unit} = "
            f"distill.micro_batch_size={distill.micro_batch_size} x cluster.num_workers="
            f"{num_workers}; use {nearest_multiples(distill.batch_size, unit)}, "
            "or a smaller distill.micro_batch_size"
        )


def cache_fits(distill: DistillConfig, losses: LossSchedule) -> None:
    """Require that a sample of the teacher is all that the recovery asks of the teacher."""
    field = f"distill.teacher_cache={distill.teacher_cache}"
    not_blank("distill.teacher_cache", distill.teacher_cache, optional=True)
    if distill.teacher_cache is None:
        return
    for name, why in (
        ("reverse_kl", "says nothing of tokens that it does not hold"),
        ("square_head", "has no hidden states"),
    ):
        if losses.peak(name):
            raise InputError(
                f"{field}: a sample of the teacher {why}; set distill.{name}_weight=0 and leave it "
                "out of distill.schedule, or leave distill.teacher_cache out"
            )
    if not losses.peak("kl"):
        raise InputError(
            f"{field}: only the KL term reads it, and distill.kl_weight=0; set that weight, or "
            "leave distill.teacher_cache out"
        )
    ramp = losses.ramps.get("temperature")
    if ramp is not None and ramp.end != distill.temperature:
        raise InputError(
            f"{field}: is drawn at one temperature, and distill.schedule moves it from "
            f"{distill.temperature:g} to {ramp.end:g}; leave it out of the schedule, or leave "
            "distill.teacher_cache out"
        )
    if distill.teacher_dtype is not None:
        raise InputError(
            f"distill.teacher_dtype={distill.teacher_dtype} with {field}: no teacher is loaded; "
            "leave one of the two out"
        )


def one_step(field: str, num_tokens: int, batch_size: int, sequence_length: int) -> None:
    """Require tokens for one optimizer step at least."""
    needed = batch_size * sequence_length
    if num_tokens < needed:
        raise InputError(
            f"{field}={num_tokens}: less than one step of {needed} tokens "
            f"(batch_size {batch_size} x sequence_length {sequence_length}); "
            f"use at least {needed}, or a smaller batch_size"
        )


def one_row(field: str, num_tokens: int, sequence_length: int) -> None:
    """Require tokens for one row at least."""
    if num_tokens < sequence_length:
        raise InputError(
            f"{field}={num_tokens}: less than one row of data.sequence_length={sequence_length} "
            f"tokens; use at least {sequence_length}"
        )


def heads_fit(hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
    """Require heads of equal, even width (rotary positions pair columns) and equal groups."""
    unit = 2 * num_heads
    if hidden_size % unit:
        raise InputError(
            f"hidden_size={hidden_size}: must be a multiple of {unit} = 2 x num_heads={num_heads}; "
            f"use {nearest_multiples(hidden_size, unit)}"
        )
    if num_heads % num_kv_heads:
        raise InputError(
            f"num_kv_heads={num_kv_heads}: must divide num_heads={num_heads}; use one of "
            + ", ".join(str(k) for k in range(1, num_heads + 1) if num_heads % k == 0)
        )
