"""The search for the rotations of a model, shared by processes that each hold the model.

Each step deals the matrices to the processes and adds up the derivatives that they find, so that
all go the same way. Shape suffixes: D hidden size, H key-value heads, K width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsify.comm import Comm, assign_by_size, sum_lanes
from sparsify.errors import NonFiniteError
from sparsify.kernels.precision import float32_products
from sparsify.pattern import Pattern
from sparsify.rotation.basis import Rotation
from sparsify.rotation.moments import ResidualMoments
from sparsify.rotation.objective import Readers, RotationParts, Writer, entropy, pruned_share
from sparsify.rotation.sites import RotationSites

LEARNING_RATE = 0.4
"""of Adam on the angles of N x N matrices, times N^-1/2, about the radians that a step turns by: a
skew matrix of N^2 steps of one size and any sign has a norm of 2 N^1/2 of them. Of 0.2 to 0.8 the
best at N = 1024, and within 2 % of the best at 64, 128 and 160"""

_BETAS = (0.9, 0.99)

_EPSILON = 1e-8

_NOISE = 1e-3  # off the identity, where a gradient may vanish by symmetry


class RotationSearch:
    """The rotations being looked for, the same on all processes.

    They are turned, never parametrised: with G the derivative by a rotation R, the derivative by
    the angles of a turn R cayley(S) at S = 0 is the skew matrix R^T G - G^T R. Adam's moments are
    kept of its entries, and its step is the S that R is turned by. Beside Adam on a free matrix
    with R as Q of its QR, no factorisation has to be differentiated, and the share of importance
    that 2:4 prunes of the embedded model (0.120 as it is) came to 0.043 in 40 steps, not 0.046.

    Args:
        sites: of the model, gains folded.
        moments: of the linears' inputs.
        pattern: that the linears will be pruned to.
        use_values: look for R2 as well.
        noise: moves the start off the identity; None starts there.
        comm: the processes that take part.
    """

    def __init__(
        self, sites: RotationSites, moments: ResidualMoments, pattern: Pattern, *,
        use_values: bool, noise: torch.Generator | None, comm: Comm,
    ) -> None:  # fmt: skip
        self._comm = comm
        self._pattern = pattern
        used = sites.values if use_values else []
        heads = [(site.num_kv_heads, site.head_dim) for site in used]
        turns = RotationParts.identity(sites.embedding.weight.shape[1], heads)
        if noise is not None:
            for matrix in turns.matrices:
                free = torch.randn(matrix.shape, generator=noise) * _NOISE
                matrix.copy_(cayley(free - free.mT))
        self._turns = turns.over(turns.flat.to(sites.head.weight.device))
        units = _units(sites, moments, use_values)
        self._num_rows = sum(count for _, count in units)
        dealt = assign_by_size([unit.num_weights for unit, _ in units], comm.num_lanes)
        self._lanes = [
            [units[index][0] for index in part]
            for where in comm.lanes(comm.num_lanes)
            for part in dealt[where]
        ]

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Mean over rows of the entropy in nats and of the pruned share."""

        def of_lane(lane: list[Readers | Writer]) -> tuple[float, float]:
            scores = (scores for unit in lane for scores in unit.scores(self._turns))
            found = [self._figures(scores_IO) for scores_IO in scores]
            return sum(one for one, _ in found), sum(other for _, other in found)

        figures = self._comm.run_together(lambda: [of_lane(lane) for lane in self._lanes])
        # Lanes in their order, which is the same for any number of processes.
        every = [figure for process in self._comm.gather_objects(figures) for figure in process]
        mean_entropy = sum(one for one, _ in every) / self._num_rows
        return mean_entropy, sum(other for _, other in every) / self._num_rows

    def _figures(self, scores_IO: Tensor) -> tuple[float, float]:
        return float(entropy(scores_IO)), float(pruned_share(scores_IO, self._pattern)[0])

    @torch.no_grad()
    def run(self, steps: int, on_step: Callable[[int, int, float], None] | None) -> None:
        """Turn by `steps` steps of Adam.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        first, second = torch.zeros_like(self._turns.flat), torch.zeros_like(self._turns.flat)
        for step in range(1, steps + 1):
            gradient = self._turns.over(torch.zeros_like(self._turns.flat))
            total = self._add_gradient(gradient)
            if not math.isfinite(total):
                raise NonFiniteError(f"rotation: the loss is {total} at step {step - 1}")
            self._turn(gradient, first, second, step)
            if on_step is not None:
                on_step(step, steps, total / self._num_rows)

    def _add_gradient(self, gradient: RotationParts) -> float:
        """The pruned share, summed over all matrices; its derivatives go to `gradient`."""

        def lanes() -> Iterator[Tensor]:
            for lane in self._lanes:
                mine = self._turns.over(torch.zeros_like(gradient.flat))
                found = [unit.add_gradient(self._turns, self._pattern, mine) for unit in lane]
                yield torch.cat([mine.flat, mine.flat.new_tensor([float(sum(found))])])

        def work() -> Tensor:
            # A step this rough may be: what is folded in the end is orthogonal all the same.
            with float32_products(allow_tf32=True):
                return sum_lanes(lanes(), Tensor.add_)

        both = self._comm.run_together(work)  # one sum for the derivatives and after them the loss
        self._comm.all_reduce_(both)
        gradient.flat.copy_(both[:-1])
        return float(both[-1])

    @float32_products()
    def _turn(self, gradient: RotationParts, first: Tensor, second: Tensor, step: int) -> None:
        """One step of Adam on the angles, with its moments `first` and `second`."""
        for matrix, slope in zip(self._turns.matrices, gradient.matrices, strict=True):
            spin = matrix.mT @ slope
            slope.copy_(spin - spin.mT)
        angles = gradient.flat
        first.lerp_(angles, 1 - _BETAS[0])
        second.lerp_(angles.square(), 1 - _BETAS[1])
        scale = (second / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
        moves = gradient.over(first / (1 - _BETAS[0] ** step) / scale)
        for matrix, move in zip(self._turns.matrices, moves.matrices, strict=True):
            matrix.copy_(matrix @ cayley(move * (LEARNING_RATE / math.sqrt(move.shape[-1]))))

    @torch.no_grad()
    def found(self) -> Rotation:
        """The rotations as they are now, orthogonal to float64's precision, those of rank 0."""
        exact = self._comm.run_together(
            lambda: [_orthogonal(matrix.double()) for matrix in self._turns.matrices]
        )
        for matrix, near in zip(exact, self._turns.matrices, strict=True):
            self._comm.broadcast_(matrix, 0)
            near.copy_(matrix)
        return Rotation(exact[0], exact[1:])


def _units(
    sites: RotationSites, moments: ResidualMoments, use_values: bool
) -> list[tuple[Readers | Writer, int]]:
    """The matrices, those of one input together, and how many rows they have."""
    used = sites.values if use_values else []
    value_of = {id(site.value): place for place, site in enumerate(used)}
    output_of = {id(site.output): place for place, site in enumerate(used)}
    units: list[tuple[Readers | Writer, int]] = []
    for site, moment_DD in zip(sites.norms, moments.norms, strict=False):
        readers = [(linear, value_of.get(id(linear))) for linear in site.readers.values()]
        num_rows = sum(linear.out_features for linear, _ in readers)
        if readers:
            units.append((Readers(readers, moment_DD), num_rows))
    for name, linear in sites.writers.items():
        place = output_of.get(id(linear))
        blocks = None if place is None else moments.values[id(linear)]
        writer = Writer(linear, moments.diagonals[name], place, blocks)
        units.append((writer, linear.out_features))
    return units


def cayley(skew: Tensor) -> Tensor:
    """(I + S/2)^-1 (I - S/2), a rotation by -S to first order; of (..., N, N) skew matrices."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity + skew / 2, identity - skew / 2)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal of R: of a rotation but for rounding, the
    rotation."""
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
