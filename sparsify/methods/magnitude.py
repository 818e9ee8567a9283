"""Magnitude pruning: keep the largest weights. The baseline that needs no data."""

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
    """Keep the weights of largest absolute value; nothing is adjusted.

    Args:
        weight_OI: (O, I), any float dtype.
        hessian_II: not looked at.
        pattern: groups in which weights compete (for unstructured, the row).
        params: not looked at.
        name: layer, for messages.

    Raises:
        NonFiniteError: the weight holds NaN or infinity.

    Reference: Han et al., arXiv:1506.02626, one step, within each group instead of the layer.

    Cost: O(O I m).
    """
    scores_OI = working_weight(weight_OI, name).abs_()
    return selected(weight_OI, keep_mask_from_scores(scores_OI, pattern))


METHOD = Method(
    name="magnitude",
    summary="keep the largest weights; no data, the weakest baseline",
    needs_hessian=False,
    solve=solve,
)
