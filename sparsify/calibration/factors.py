"""Hessians factored ahead of the solve, their work dealt out over the processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from sparsify.calibration.cholesky import invert_factor_together_
from sparsify.calibration.hessian import InverseFactor, inverse_factor
from sparsify.calibration.lookahead import Lookahead
from sparsify.calibration.moments import InputMoments
from sparsify.comm import Comm, assign_by_size, shared_by_all
from sparsify.errors import NonFiniteError, SingularHessianError


def assign_factors(
    moments: dict[str, InputMoments], damping: float, comm: Comm, ahead: Lookahead | None
) -> Callable[[str], None]:
    """Factor every Hessian once, or start to, each on one of the processes or on all together.

    All take part in those that others would wait for: wide ones that are more work than one lane's
    share of the whole. A fixed order has the same lanes, and so shares the same ones, for every
    number of processes. Of the others the largest go first, each to the process with the least work
    so far.

    Args:
        moments: layer name, for messages -> its moments; the same on all processes.
        damping: see `hessian.inverse_factor`.
        comm: the processes.
        ahead: does what this process factors alone beside the caller, in the order of the layers;
            None: it is done before this returns. What is shared waits until it is asked for.

    Returns:
        What waits for the factor of a layer and hands it to all processes. They ask for one layer
        after another in the same order.

    Raises, or has the returned raise, on all processes alike:
        NonFiniteError, SingularHessianError: see `hessian.inverse_factor`.
    """
    sizes = {name: len(found.hessian_II) for name, found in moments.items()}
    shared = shared_by_all(sizes, comm.num_lanes)
    alone = [name for name in sizes if name not in shared]
    parts = assign_by_size([sizes[name] ** 3 for name in alone], comm.world_size)
    owner = {alone[index]: rank for rank, part in enumerate(parts) for index in part}
    mine = {
        name: partial(stats.factor, damping, name)
        for name, stats in moments.items()
        if owner.get(name) == comm.rank
    }
    started: Mapping[str, Callable[[], InverseFactor]] = mine
    if ahead is None:
        comm.run_together(lambda: [make() for make in mine.values()])  # they keep what they made
    else:
        started = {name: ahead.start(make, InverseFactor.tensors) for name, make in mine.items()}

    def assign(name: str) -> None:
        hessian_II = moments[name].hessian_II
        if name in shared:
            together = partial(invert_factor_together_, comm=comm)
            moments[name].put_factor(damping, inverse_factor(hessian_II, damping, name, together))
            return
        made, failure, facts = None, None, None
        if name in started:
            try:
                made = started[name]()
                facts = made.damping, made.num_attempts, made.condition
            except (NonFiniteError, SingularHessianError) as error:
                failure = error
        failure, facts = comm.gather_objects((failure, facts))[owner[name]]
        if failure is not None:
            raise failure
        assert facts is not None
        used, num_attempts, condition = facts
        # One layout on all processes, whether the factor was computed here or received.
        upper_II = torch.empty_like(hessian_II) if made is None else made.upper_II.contiguous()
        comm.broadcast_(upper_II, owner[name])
        dead_I = hessian_II.diagonal() == 0
        factor = InverseFactor(upper_II, used, num_attempts, dead_I, condition)
        moments[name].put_factor(damping, factor)

    return assign
