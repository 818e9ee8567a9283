"""Second moments of what the linears of a decoder receive, as far as a rotation depends on them.

Shape suffixes: D hidden size, T tokens, I input features of a writer, H key-value heads, Q query
heads of one of them, K width of a head.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.hessian import HessianSum
from sparsify.comm import Comm, sum_lanes
from sparsify.data.rows import TokenRows
from sparsify.models.calls import StopForward, run_model
from sparsify.models.watch import hooked, watch_inputs
from sparsify.rotation.sites import RotationSites


@dataclass
class ResidualMoments:
    """Moments of the linears' inputs in the dense model, gains folded."""

    norms: list[Tensor]
    """(D, D) float32 per norm but the last"""
    diagonals: dict[str, Tensor]
    """writer -> (I,) float32"""
    values: dict[int, Tensor]
    """id of an output projection -> float32 (H, Q, K, K), the blocks of its heads"""


@torch.no_grad()
def residual_moments(
    model: nn.Module, sites: RotationSites, rows: TokenRows, batch_size: int, comm: Comm
) -> ResidualMoments:
    """Means over the tokens of `rows`, of all blocks in one forward without the output layer.

    Args:
        model: in evaluation mode; on every process the same.
        sites: of the model.
        rows: all rows, on every process; each works on its part of them.
        batch_size: rows per forward.
        comm: the processes that take part.

    Raises:
        NonFiniteError, CalibrationError: see `hessian.HessianSum.mean`; on all processes.

    Memory: a sum of the size of the result, on a CPU in float64 where it is of a norm; with a fixed
    order on one process four of them.
    """

    def of_lane(lane: TokenRows) -> _Sums:
        sums = _Sums(sites)
        for batch in lane.split(batch_size):
            sums.add(model, batch)
        return sums

    lanes = [rows[where] for where in comm.lanes(len(rows))]
    total = comm.run_together(lambda: sum_lanes(map(of_lane, lanes), _Sums.merge))
    total.reduce(comm)
    return comm.run_together(lambda: total.means(rows.num_tokens))


class _Sums:
    """Sums over the tokens of one lane; see `ResidualMoments`."""

    def __init__(self, sites: RotationSites) -> None:
        device = sites.head.weight.device
        width = sites.embedding.weight.shape[1]
        self._sites = sites
        self._heads = {id(site.output): site for site in sites.values}
        self._norms = [HessianSum(width, device) for _ in sites.norms[:-1]]
        self._diagonals = {
            name: torch.zeros(linear.in_features, device=device)
            for name, linear in sites.writers.items()
        }
        self._values = {
            key: torch.zeros(
                site.num_kv_heads, site.num_queries, site.head_dim, site.head_dim, device=device
            )
            for key, site in self._heads.items()
        }

    def add(self, model: nn.Module, batch: TokenRows) -> None:
        """Run the model up to its last norm, after which nothing is measured."""
        first = [next(iter(site.readers.items())) for site in self._sites.norms[:-1]]
        total = {name: total for (name, _), total in zip(first, self._norms, strict=True)}
        last = self._sites.norms[-1].norm
        with (
            watch_inputs(dict(first), lambda name, value: total[name].add(value)),
            watch_inputs(self._sites.writers, self._note_writer),
            hooked([last.register_forward_pre_hook(_stop)]),
            contextlib.suppress(StopForward),
        ):
            run_model(model, batch.to(self._sites.head.weight.device))

    def _note_writer(self, name: str, value: Tensor) -> None:
        flat_TI = value.reshape(-1, value.shape[-1]).float()
        self._diagonals[name] += flat_TI.square().sum(0)
        key = id(self._sites.writers[name])
        if (site := self._heads.get(key)) is not None:
            split = flat_TI.reshape(-1, site.num_kv_heads, site.num_queries, site.head_dim)
            self._values[key] += torch.einsum("thqk,thql->hqkl", split, split)

    def merge(self, other: _Sums) -> None:
        """Add the sums of `other`, in place."""
        for total, more in zip(self._norms, other._norms, strict=True):
            total.merge(more)
        for name, diagonal_I in other._diagonals.items():
            self._diagonals[name] += diagonal_I
        for key, blocks_HQKK in other._values.items():
            self._values[key] += blocks_HQKK

    def reduce(self, comm: Comm) -> None:
        """Add up the sums of all processes, on all of them."""
        for total in self._norms:
            total.reduce(comm)
        for tensor in [*self._diagonals.values(), *self._values.values()]:
            comm.all_reduce_(tensor)

    def means(self, num_tokens: int) -> ResidualMoments:
        return ResidualMoments(
            [total.mean() for total in self._norms],
            {name: diagonal_I / num_tokens for name, diagonal_I in self._diagonals.items()},
            {key: blocks_HQKK / num_tokens for key, blocks_HQKK in self._values.items()},
        )


def _stop(module: nn.Module, args: Any) -> None:
    raise StopForward
