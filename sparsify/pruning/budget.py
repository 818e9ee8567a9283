"""Which matrices stay dense when not all of a model has to be sparse: damage, cost, and the choice.

Hardware knows only dense and N:M matrices, so a budget between the two is spent by leaving some
matrices dense. Damage of pruning a matrix is measured on rows; its cost is bytes or seconds; the
choice is a 0/1 knapsack. Shape suffixes: O output features, I input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsify.costs.roofline import matrix_bytes, matrix_latency
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError, NonFiniteError
from sparsify.evaluation.divergence import forward_kl
from sparsify.models.calls import evaluating, logits_of
from sparsify.pattern import Pattern

BudgetKind = Literal["size", "latency"]

_MAX_UNITS = 100_000  # capacity of the knapsack after scaling

_MAX_CELLS = 200_000_000  # matrices x units: one byte each


@dataclass(frozen=True)
class Allocation:
    """Which matrices stay dense, and why."""

    dense_names: list[str]
    """matrices to leave dense, in the order in which they were given"""
    damages: dict[str, float]
    """matrix -> damage of pruning it, as the choice took it"""
    cost_share: float
    """cost of the result as a share of the cost with all of these matrices dense"""
    least_share: float
    """the same with all of them sparse: the smallest budget there is"""


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    rows: TokenRows,
    pruned_weights: Mapping[str, Tensor],
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
    *,
    from_sparse: bool = False,
) -> dict[str, float]:
    """Damage of pruning each matrix, in KL(dense || changed) on rows.

    With all others dense: the KL with only that one pruned. With `from_sparse`, with all others
    pruned: by how much the KL with all pruned falls when that one is dense. Damages do not add up,
    so the two differ; each is right near its own end.

    Args:
        model: the dense model; its weights are swapped and put back.
        rows: rows that the pruned weights were not fitted to. Positions whose next token belongs
            to another document, or that end a row, are not scored.
        pruned_weights: layer name -> its pruned weight (O, I); may lie on another device.
        batch_size: rows per forward.
        on_batch: called as on_batch(matrices done, matrices in all), over all batches.
        from_sparse: see above.

    Returns:
        Name -> nats per token, in the order of `pruned_weights`; may be negative.

    Raises:
        InputError: a name is no nn.Linear of the model or the shapes differ; no row or no position
            to score.
        NonFiniteError: logits are not finite; names the matrix.

    Cost: for K matrices K + 1 forwards over the rows, K + 2 with `from_sparse`, which also holds
    all pruned weights beside the model; the logits of one batch twice.
    """
    linears = {name: _linear(model, name, weight) for name, weight in pruned_weights.items()}
    if len(rows) == 0 or batch_size < 1:
        raise InputError(
            f"allocation: {len(rows)} rows in batches of {batch_size}; both must be at least 1"
        )
    if not rows.has_next_NT.any():
        raise InputError("allocation: the rows hold no two tokens of one document to score")
    device = next(model.parameters()).device
    dense_weights = {name: linear.weight.data for name, linear in linears.items()}
    all_pruned = pruned_weights if from_sparse else {}
    totals = dict.fromkeys(linears, 0.0)
    num_done = 0
    batches = [batch for batch in rows.split(batch_size) if batch.has_next_NT.any()]
    with evaluating(model):
        for batch in (batch.to(device) for batch in batches):
            dense_logits = _logits(model, batch)
            with _swapped(linears, all_pruned):
                base = float(forward_kl(_logits(model, batch), dense_logits)) if from_sparse else 0
                for name in linears:
                    other = dense_weights if from_sparse else pruned_weights
                    with _swapped(linears, {name: other[name]}):
                        kl = float(forward_kl(_logits(model, batch), dense_logits))
                    totals[name] += (base - kl if from_sparse else kl) * len(dense_logits)
                    num_done += 1
                    if on_batch is not None:
                        on_batch(num_done, len(batches) * len(linears))
    damages = {name: total / int(rows.has_next_NT.sum()) for name, total in totals.items()}
    _require_finite(damages)
    return damages


def _linear(model: nn.Module, name: str, weight_OI: Tensor) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise InputError(f"allocation: {name} is no linear layer of the model")
    if module.weight.shape != weight_OI.shape:
        raise InputError(
            f"allocation: {name} has shape {tuple(module.weight.shape)}, its pruned weight "
            f"{tuple(weight_OI.shape)}; both must come from one model"
        )
    return module


def _logits(model: nn.Module, batch: TokenRows) -> Tensor:
    """Logits of the positions that have a next token, (tokens, vocabulary)."""
    return logits_of(model, batch)[batch.has_next_NT]


@contextmanager
def _swapped(linears: Mapping[str, nn.Linear], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights for a while."""
    before = {name: linears[name].weight.data for name in weights}
    try:
        for name, weight_OI in weights.items():
            linears[name].weight.data = weight_OI.to(before[name].device, before[name].dtype)
        yield
    finally:
        for name, weight_OI in before.items():
            linears[name].weight.data = weight_OI


def _require_finite(damages: Mapping[str, float]) -> None:
    for name, damage in damages.items():
        if not math.isfinite(damage):
            raise NonFiniteError(
                f"{name}: the damage of pruning it is {damage}; its pruned weight, or the logits "
                "of the model, are not finite"
            )


def choose_dense(
    damage: Mapping[str, float],
    dense_cost: Mapping[str, float],
    sparse_cost: Mapping[str, float],
    budget: float,
) -> list[str]:
    """The matrices to leave dense: the most damage avoided that the budget allows.

    Maximises the sum of damages of the dense matrices subject to the total cost being at most
    `budget` times the cost of all dense. Damages are taken to add up, which they do to first order
    only.

    Args:
        damage: name -> damage of pruning it; what is 0 or less is never worth leaving dense.
        dense_cost, sparse_cost: name -> cost, 0 or more, any unit, the same names.
        budget: share of the dense total, at most 1.

    Returns:
        Names in the order of `damage`.

    Raises:
        InputError: the budget is above 1 or below the cost of all sparse, or names differ.
        NonFiniteError: a damage is NaN or infinite.

    Exactness: dynamic programming over the extra cost in integer units. Costs that are whole
    numbers are divided by their greatest common divisor; the answer is then optimal whenever the
    capacity is at most U units. U is 100,000, or 2e8 / K for more than 2,000 matrices. Other costs
    are rounded up to units of capacity / U: the answer always keeps to the budget, and avoids at
    least as much damage as any choice whose extra cost is below (1 - K / U) of the capacity.
    Cost: K U operations and bytes for K matrices.
    """
    names = list(damage)
    if not names or set(names) != set(dense_cost) or set(names) != set(sparse_cost):
        raise InputError("allocation: damages and costs must name the same matrices, at least one")
    _require_finite(damage)
    total = math.fsum(dense_cost.values())
    least = math.fsum(sparse_cost.values())
    if not least / total <= budget <= 1:
        raise InputError(
            f"budget={budget}: must be a share of the dense cost from {least / total:.4g} (every "
            "matrix sparse) to 1 (every matrix dense)"
        )
    capacity = budget * total - least
    extra = {name: dense_cost[name] - sparse_cost[name] for name in names}
    chosen = {name for name in names if extra[name] <= 0 and damage[name] > 0}
    capacity -= math.fsum(extra[name] for name in chosen)
    capacity *= 1 + 1e-12  # a budget of exactly one more matrix must not fail by rounding
    items = [name for name in names if damage[name] > 0 and 0 < extra[name] <= capacity]
    if items:
        costs, limit = _in_units([extra[name] for name in items], capacity)
        best = _knapsack([damage[name] for name in items], costs, limit)
        chosen |= {items[index] for index in best}
        # Room that rounding up has left over.
        left = capacity - math.fsum(extra[items[index]] for index in best)
        for name in sorted(set(items) - chosen, key=lambda name: -damage[name]):
            if extra[name] <= left:
                chosen.add(name)
                left -= extra[name]
    return [name for name in names if name in chosen]


def _in_units(costs: Sequence[float], capacity: float) -> tuple[list[int], int]:
    """Costs as whole numbers of a unit, and the capacity in it."""
    most = min(_MAX_UNITS, _MAX_CELLS // len(costs))
    if all(float(cost).is_integer() for cost in costs):
        unit = math.gcd(*(int(cost) for cost in costs))
        if capacity / unit < most + 1:
            return [int(cost) // unit for cost in costs], math.floor(capacity / unit)
    return [math.ceil(cost / capacity * most) for cost in costs], most


def _knapsack(values: Sequence[float], costs: Sequence[int], capacity: int) -> list[int]:
    """Indices of the best subset: exact, values real, costs whole numbers of at least 1."""
    best = torch.zeros(capacity + 1, dtype=torch.float64)
    taken = torch.zeros(len(values), capacity + 1, dtype=torch.bool)
    for index, (value, cost) in enumerate(zip(values, costs, strict=True)):
        if cost > capacity:
            continue
        with_it = best[: capacity + 1 - cost] + value
        taken[index, cost:] = with_it > best[cost:]
        best[cost:] = torch.maximum(best[cost:], with_it)
    chosen, left = [], capacity
    for index in reversed(range(len(values))):
        if taken[index, left]:
            chosen.append(index)
            left -= costs[index]
    return chosen


def _between(
    model: nn.Module, rows: TokenRows, pruned_weights: Mapping[str, Tensor], batch_size: int,
    nearness: float, on_batch: Callable[[int, int], None] | None,
) -> dict[str, float]:  # fmt: skip
    """Damages between the dense end (nearness 1) and the sparse one (0)."""
    ends = []
    for index in range(2):

        def report(done: int, total: int, index: int = index) -> None:
            if on_batch is not None:
                on_batch(index * total + done, 2 * total)

        ends.append(
            sensitivities(model, rows, pruned_weights, batch_size, report, from_sparse=index == 1)
        )
    return {name: nearness * ends[0][name] + (1 - nearness) * ends[1][name] for name in ends[0]}


def allocate(
    model: nn.Module,
    rows: TokenRows,
    pruned_weights: Mapping[str, Tensor],
    budget_kind: BudgetKind,
    budget: float,
    *,
    pattern: Pattern,
    batch_size: int,
    weight_bits: int = 16,
    on_batch: Callable[[int, int], None] | None = None,
) -> Allocation:
    """Choose which matrices of a model stay dense under a budget of size or latency.

    Damages are measured by `sensitivities` from both ends; taken is t d_dense + (1 - t) d_sparse,
    with t how far the budget lies between all sparse and all dense. The relative errors of a
    pruning report cost nothing in their place, and ranked no better than chance where measured.

    Args:
        model: the dense model.
        rows: rows to measure damage on, best ones that the weights were not fitted to.
        pruned_weights: layer name -> pruned weight, of all matrices that may be pruned.
        budget_kind: size counts bytes, latency seconds of decoding one token by `matrix_latency`:
            the same share, because decoding is bound by memory.
        budget: share of the cost of these matrices dense; embeddings and other layers that are
            never pruned do not count.
        pattern: of the pruned weights.
        batch_size: rows per forward.
        weight_bits: bits of a stored value, dense and sparse alike.
        on_batch: called as on_batch(matrices done, matrices in all), over both ends.

    Returns:
        `Allocation`. Prune again with `dense_names` skipped: the other layers' weights then make
        up for fewer errors before them.

    Raises:
        InputError: see `sensitivities` and `choose_dense`; unknown budget_kind. A budget that
            cannot be met is refused before anything is measured.
        NonFiniteError: see `sensitivities`.

    Cost: that of `sensitivities` from both ends, and of `choose_dense`.
    """

    def cost(name: str, of: Pattern | None) -> float:
        rows_columns = (pruned_weights[name].shape[0], pruned_weights[name].shape[1])
        if budget_kind == "latency":
            return matrix_latency(rows_columns, of, weight_bits)
        return matrix_bytes(rows_columns, of, weight_bits)

    if budget_kind not in ("size", "latency"):
        raise InputError(f"budget_kind={budget_kind}: unknown; use size or latency")
    dense_cost = {name: cost(name, None) for name in pruned_weights}
    sparse_cost = {name: cost(name, pattern) for name in pruned_weights}
    choose_dense(dict.fromkeys(pruned_weights, 0.0), dense_cost, sparse_cost, budget)  # checks
    total = math.fsum(dense_cost.values())
    least = math.fsum(sparse_cost.values()) / total
    nearness = (budget - least) / (1 - least) if least < 1 else 1.0
    damages = _between(model, rows, pruned_weights, batch_size, nearness, on_batch)
    dense_names = choose_dense(damages, dense_cost, sparse_cost, budget)
    used = math.fsum({**sparse_cost, **{n: dense_cost[n] for n in dense_names}}.values())
    return Allocation(dense_names, damages, used / total, least)
