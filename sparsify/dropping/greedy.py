"""One at a time: what costs the least KL divergence from the full model's predictions goes first.

Each round tries every candidate that is left on all rows, and drops the best of them for good. With
L candidates, n of which are dropped, that is L + (L-1) + ... + (L-n+1) forwards over the rows, of
which each begins at the layer that it tries, and one of the full model a round.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch

from sparsify.data.rows import TokenRows
from sparsify.dropping._base import PARTS, Choice, Rule, Task, Unit
from sparsify.errors import InputError, NonFiniteError
from sparsify.files import write_json
from sparsify.models.calls import BlockCalls
from sparsify.models.isolation import check_isolation
from sparsify.models.partial import PartialModel
from sparsify.models.sublayers import require_residual, sublayers_of


def choose(task: Task) -> Choice:
    """Drop candidates one after another, each time the one that leaves the least KL divergence.

    Its rounds are kept in `task.state`, after each of which a killed run continues. A layer whose
    attention and MLP both went is dropped as a whole.

    Returns:
        The choice, with `rounds`: what went in each, its KL (nats per token, all tokens of the
        rows), and that of every other candidate.

    Raises:
        NonFiniteError: no candidate leaves finite logits.
        InputError: sublayers are candidates, and the model has none that can be left out.
    """
    blocks = task.open()
    for index in range(len(blocks.blocks)):
        blocks.open(index)
    assert task.rows is not None, "the rule needs rows"
    model = blocks.model
    if task.rows.is_joined:
        check_isolation(model)
    partial = PartialModel(model)
    if set(task.parts) != {"layers"} and len(task.rows):
        _check_sublayers(partial, task.rows)
    rounds: list[dict[str, Any]] = []
    if task.state is not None and task.state.is_file():
        rounds = json.loads(task.state.read_bytes())
    dropped = [Unit(**one["unit"]) for one in rounds]
    while len(dropped) < task.num_dropped:
        units = candidates(len(partial.blocks), task.parts, dropped)
        if not units:
            raise InputError(
                f"drop.num_layers={task.num_dropped}: nothing would be left after "
                f"{len(dropped)} of them; drop fewer"
            )
        kls = _divergences(partial, task, dropped, units)
        finite = [kl for kl in kls if math.isfinite(kl)]
        if not finite:
            raise NonFiniteError("drop: no candidate leaves finite logits; the model overflows")
        best = kls.index(min(finite))
        dropped.append(units[best])
        rounds.append(
            {
                "unit": {"layer": units[best].layer, "part": units[best].part},
                "kl": kls[best],
                "candidates": [
                    {"layer": unit.layer, "part": unit.part, "kl": _plain(kl)}
                    for unit, kl in zip(units, kls, strict=True)
                ],
            }
        )
        if task.state is not None and task.comm.rank == 0:
            write_json(task.state, rounds)
    return Choice(merged(dropped), {"rounds": rounds})


def candidates(num_layers: int, parts: Sequence[str], dropped: Collection[Unit]) -> list[Unit]:
    """What can go next, in order of layers: nothing of a layer that is gone, and not the last."""
    gone = {unit.layer for unit in merged(dropped) if unit.part == "layers"}
    taken = set(dropped)
    found = []
    for layer in range(num_layers):
        if layer in gone:
            continue
        for part in (part for part in PARTS if part in parts):
            unit = Unit(layer, part)
            ends = {u.layer for u in merged([*dropped, unit]) if u.part == "layers"}
            if unit not in taken and len(ends) < num_layers:
                found.append(unit)
    return found


def merged(units: Collection[Unit]) -> tuple[Unit, ...]:
    """The units in order; a layer in place of its two sublayers, and without any beside it."""
    layers = {unit.layer for unit in units if unit.part == "layers"}
    both = [{u.layer for u in units if u.part == part} for part in ("attention", "mlp")]
    layers |= both[0] & both[1]
    rest = [unit for unit in units if unit.layer not in layers]
    return tuple(sorted([*rest, *(Unit(layer) for layer in layers)]))


def _divergences(
    partial: PartialModel, task: Task, dropped: Sequence[Unit], units: Sequence[Unit]
) -> list[float]:
    """KL per token of the model without what is dropped, and without one unit more, for each."""
    assert task.rows is not None
    assert task.divergence is not None
    sums = torch.zeros(len(units) + 1, dtype=torch.float64, device=task.device)
    gone = {unit.layer for unit in merged(dropped) if unit.part == "layers"}
    quiet = [_module(partial, unit) for unit in dropped if unit.part != "layers"]
    batches = task.rows.split(task.batch_size) if len(task.rows) else []
    for at, rows in enumerate(batches):
        batch = rows.to(task.device)
        _, full_BTV = partial.inputs(batch)
        inputs, _ = partial.inputs(batch, gone, quiet)
        for number, unit in enumerate(units):
            is_layer = unit.part == "layers"
            start = unit.layer + is_layer
            logits_BTV = partial.logits(
                batch, gone | ({unit.layer} if is_layer else set()),
                quiet if is_layer else [*quiet, _module(partial, unit)],
                start, inputs[unit.layer],
            )  # fmt: skip
            kl = task.divergence(logits_BTV, full_BTV).double()
            sums[number] += kl * batch.ids_NT.numel()
            done = at * len(units) + number + 1
            what = f"forwards of choice {len(dropped) + 1} of {task.num_dropped}"
            task.on_step(done, len(batches) * len(units), what)
        sums[-1] += batch.ids_NT.numel()
    task.comm.all_reduce_(sums)
    return (sums[:-1] / sums[-1]).tolist()


def _module(partial: PartialModel, unit: Unit) -> torch.nn.Module:
    block = partial.blocks[unit.layer]
    return block.get_submodule(sublayers_of(block, type(partial.model).__name__)[unit.part])


def _check_sublayers(partial: PartialModel, rows: TokenRows) -> None:
    """Require of every block that its sublayers can be left out."""
    model, name = partial.model, type(partial.model).__name__
    calls = BlockCalls(model, partial.blocks)
    calls.learn(partial.blocks[0], rows[:1])
    hidden_BTD, arguments = calls.all(rows[:1])
    for index, block in enumerate(partial.blocks):
        require_residual(block, arguments.call(index, hidden_BTD), name)


def _plain(kl: float) -> float | None:
    """As JSON has it: no infinities."""
    return kl if math.isfinite(kl) else None


RULE = Rule("greedy", "one at a time, by KL to the full model's predictions", choose, parts=PARTS)
