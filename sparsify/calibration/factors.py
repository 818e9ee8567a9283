"""Hessians factored ahead of the solve, their work dealt out over the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sparsify.calibration.cholesky import invert_factor_together_
from sparsify.calibration.hessian import InverseFactor, inverse_factor
from sparsify.calibration.lookahead import Lookahead
from sparsify.calibration.moments import InputMoments, factor_all
from sparsify.comm import Comm, assign_by_size, shared_by_all
from sparsify.errors import NonFiniteError, SingularHessianError


def assign_factors(
    moments: dict[str, InputMoments], stacks: Sequence[Sequence[str]], damping: float, comm: Comm,
    ahead: Lookahead | None,
) -> Callable[[Sequence[str]], None]:  # fmt: skip
    """Factor every Hessian once, or start to, each on one of the processes or on all together.

    All take part in those that others would wait for: wide ones that are more work than one lane's
    share of the whole. A fixed order has the same lanes, and so shares the same ones, for every
    number of processes. Of the others the largest go first, each to the process with the least work
    so far. The Hessians of a stack are of one process, and factored in one go.

    Args:
        moments: layer name, for messages -> its moments; the same on all processes.
        stacks: the same names, those together whose Hessians are of one width and that are to be
            factored together.
        damping: see `hessian.inverse_factor`.
        comm: the processes.
        ahead: does what this process factors alone beside the caller, in the order of the stacks;
            None: it is done before this returns. What is shared waits until it is asked for.

    Returns:
        What waits for the factors of a stack and hands them to all processes. They ask for one
        stack after another in the same order.

    Raises, or has the returned raise, on all processes alike:
        NonFiniteError, SingularHessianError: see `hessian.inverse_factor`.
    """
    sizes = {name: len(found.hessian_II) for name, found in moments.items()}
    shared = shared_by_all(sizes, comm.num_lanes)
    alone = [stack for stack in stacks if stack[0] not in shared]
    work = [len(stack) * sizes[stack[0]] ** 3 for stack in alone]
    parts = assign_by_size(work, comm.world_size)
    owner = {alone[index][0]: rank for rank, part in enumerate(parts) for index in part}
    mine = {
        stack[0]: partial(factor_all, [moments[name] for name in stack], damping, stack)
        for stack in alone
        if owner[stack[0]] == comm.rank
    }
    started: dict[str, Callable[[], list[InverseFactor]]] = {**mine}
    if ahead is None:
        comm.run_together(lambda: [make() for make in mine.values()])  # they keep what they made
    else:
        started = {first: ahead.start(make, _tensors) for first, make in mine.items()}

    def assign(stack: Sequence[str]) -> None:
        if stack[0] in shared:
            together = partial(invert_factor_together_, comm=comm)
            for name in stack:
                factor = inverse_factor(moments[name].hessian_II, damping, name, together)
                moments[name].put_factor(damping, factor)
            return
        made, failure = None, None
        facts: list[Any] = [None] * len(stack)
        make = started.pop(stack[0], None)  # let go before all processes' copy is made
        if make is not None:
            try:
                made = make()
                facts = [(factor.damping, factor.num_attempts, factor.condition) for factor in made]
            except (NonFiniteError, SingularHessianError) as error:
                failure = error
        failure, facts = comm.gather_objects((failure, facts))[owner[stack[0]]]
        if failure is not None:
            raise failure
        if comm.world_size > 1:
            those = [moments[name] for name in stack]
            _hand_out(those, made, facts, damping, comm, owner[stack[0]])

    return assign


def _tensors(factors: Sequence[InverseFactor]) -> Iterable[Tensor]:
    return chain.from_iterable(factor.tensors() for factor in factors)


def _hand_out(
    moments: Sequence[InputMoments], made: Sequence[InverseFactor] | None, facts: Sequence[Any],
    damping: float, comm: Comm, owner: int,
) -> None:  # fmt: skip
    """Give all processes the factors of a stack that one has made, of which they know `facts`."""
    shape = len(moments), *moments[0].hessian_II.shape
    if made is None:
        upper_EII = moments[0].hessian_II.new_empty(shape)
    elif len(made) == 1:  # it may be large: no copy
        upper_EII = made[0].upper_II.contiguous().unsqueeze(0)
    else:
        upper_EII = torch.stack([factor.upper_II for factor in made])
    comm.broadcast_(upper_EII, owner)
    dead_EI = torch.stack([found.hessian_II.diagonal() for found in moments]) == 0
    for index, (found, (used, num_attempts, condition)) in enumerate(
        zip(moments, facts, strict=True)
    ):
        factor = InverseFactor(upper_EII[index], used, num_attempts, dead_EI[index], condition)
        found.put_factor(damping, factor)
