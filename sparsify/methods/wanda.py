"""Wanda: keep the weights whose size times the size of their input is largest."""

from __future__ import annotations

from torch import Tensor

from sparsify.methods._base import Method, PruneParams, Solution, selected, working_weight
from sparsify.pattern import Pattern, keep_mask_from_scores


def solve(
    weight_OI: Tensor,
    hessian_II: Tensor | None,
    pattern: Pattern,
    params: PruneParams,
    name: str,
) -> Solution:
    """Keep the weights of largest |W_ij| * rms(x_j); nothing is adjusted.

    Args:
        weight_OI: (O, I), any float dtype.
        hessian_II: (I, I); only its diagonal, the mean square of each input, is read.
        pattern: groups in which weights compete (for unstructured, the row).
        params: not looked at.
        name: layer, for messages.

    Raises:
        NonFiniteError: the weight holds NaN or infinity.

    Reference: Wanda (arXiv:2306.11695), equation 1. Deviation: the root mean square of an input
    instead of its 2-norm, a common factor of all scores.

    Cost: O(O I m).
    """
    assert hessian_II is not None, "Wanda needs the Hessian's diagonal"
    scores_OI = working_weight(weight_OI, name).abs_()
    scores_OI *= hessian_II.diagonal().to(scores_OI.dtype).sqrt()
    solution = selected(weight_OI, keep_mask_from_scores(scores_OI, pattern))
    solution.num_dead_columns = int((hessian_II.diagonal() == 0).sum())
    return solution


METHOD = Method(
    name="wanda",
    summary="keep the largest weight x input size; fast, no adjustment of what stays",
    needs_hessian=True,
    solve=solve,
)
