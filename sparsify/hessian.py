"""The second moment of a layer's inputs: streaming sum, and the factor of its inverse.

Shape suffixes: T tokens, I input features. Knows tensors and `Comm` only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.comm import Comm
from sparsify.errors import CalibrationError, NonFiniteError, SingularHessianError

_DAMPING_STEP = 10.0
_MAX_DAMPING = 1.0


class HessianSum:
    """Running sum of X^T X over calibration tokens; sums of several processes can be added.

    Memory: one (I, I) float32 matrix.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self._sum_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add the tokens of `inputs` (..., I), any float dtype; all of them must be real tokens.

        Cost: 2 T I^2 operations. Half-precision inputs are multiplied exactly: a product of two
        bfloat16 or float16 numbers fits float32, in which the sum is kept.
        """
        inputs_TI = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self._sum_II.addmm_(inputs_TI.T, inputs_TI)
        self.num_tokens += inputs_TI.shape[0]

    def reduce(self, comm: Comm) -> None:
        """Add up the sums and token counts of all processes, on all of them."""
        comm.all_reduce_(self._sum_II)
        # float64 counts tokens exactly up to 2^53; float32 only up to 16.8 million.
        count = torch.tensor([self.num_tokens], dtype=torch.float64, device=self._sum_II.device)
        comm.all_reduce_(count)
        self.num_tokens = int(count.item())

    def mean(self) -> Tensor:
        """X^T X / num_tokens, float32 (I, I).

        Raises:
            CalibrationError: no token was added.
            NonFiniteError: an input was NaN or infinite, or a square overflowed float32. After
                `reduce` every process raises it, whichever process met the value.
        """
        if self.num_tokens == 0:
            raise CalibrationError("no calibration token reached this layer; use more rows")
        # One NaN or infinity in column j of X makes entry (j, j) NaN or infinite.
        bad = (~torch.isfinite(self._sum_II.diagonal())).nonzero().flatten()
        if len(bad):
            raise NonFiniteError(
                f"inputs hold NaN or infinity in {len(bad)} of {len(self._sum_II)} columns, first "
                f"column {int(bad[0])}; check the weights before this layer or use a wider dtype"
            )
        return self._sum_II / self.num_tokens


@dataclass(frozen=True)
class InverseFactor:
    """U with inverse(H + d I) = U^T U, and what it took to get it."""

    upper_II: Tensor
    """upper triangular, positive diagonal; dtype of the Hessian (at least float32)"""
    damping: float
    """share of the mean diagonal that was added in the attempt that worked"""
    num_attempts: int
    """1 when the requested damping worked"""
    dead_columns: Tensor
    """bool (I,): inputs that were zero on every calibration token"""


def inverse_factor(hessian_II: Tensor, damping: float, name: str) -> InverseFactor:
    """Upper Cholesky factor of the inverse of the damped Hessian, without forming the inverse.

    With J the flip of the order of columns: L = chol(J H J), R = J L J is upper triangular with
    H = R R^T, and U = R^-1 gives inverse(H) = U^T U. The factor is unique, so it is the one that
    SparseGPT and GPTQ get from chol(inverse(chol(H))), with one factorisation fewer to fail.

    Args:
        hessian_II: symmetric (I, I); not changed.
        damping: this share of the mean of the diagonal is added to the diagonal.
        name: layer, for messages.

    Returns:
        `InverseFactor`. When the factorisation fails, damping grows tenfold up to 1.0; the value
        that worked is in the result and belongs in the run's record. damping = 0 is never raised.

    Raises:
        NonFiniteError: the Hessian holds NaN or infinity.
        SingularHessianError: not positive definite with the largest damping; the message gives
            the numerical rank of the data.

    Reference: SparseGPT (arXiv:2301.00774), section 3.3 and Algorithm 1. Deviation: the mean of
    the diagonal is taken over the columns that are not dead, so that the result does not depend
    on the scale of the Hessian (dead columns get the diagonal 1 and are decoupled from the rest).

    Cost: 2/3 I^3 operations, three (I, I) matrices.
    """
    if not bool(torch.isfinite(hessian_II).all()):
        raise NonFiniteError(f"{name}: the Hessian holds NaN or infinity; check the calibration")
    hessian_II = hessian_II.to(torch.promote_types(hessian_II.dtype, torch.float32))
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    scale = 1.0 if bool(dead_I.all()) else float(diagonal_I[~dead_I].mean())
    attempts = [damping]
    while 0 < attempts[-1] < _MAX_DAMPING:
        attempts.append(min(attempts[-1] * _DAMPING_STEP, _MAX_DAMPING))
    for num_attempts, tried in enumerate(attempts, start=1):
        flipped_II = hessian_II.flip(0, 1)
        flipped_II.diagonal().add_(dead_I.flip(0)).add_(tried * scale)
        lower_II = _cholesky(flipped_II)
        if lower_II is not None:
            eye_II = torch.eye(len(dead_I), dtype=hessian_II.dtype, device=hessian_II.device)
            upper_II = torch.linalg.solve_triangular(lower_II.flip(0, 1), eye_II, upper=True)
            return InverseFactor(upper_II, tried, num_attempts, dead_I)
    rank = int(torch.linalg.matrix_rank(hessian_II, hermitian=True))
    raise SingularHessianError(
        f"{name}: the Hessian is singular: the calibration data has rank {rank} where the layer "
        f"has {len(dead_I)} input columns (damping tried: "
        f"{', '.join(f'{value:g}' for value in attempts)}); use more or more varied calibration "
        "rows, or a larger prune.damping"
    )


def _cholesky(matrix_II: Tensor) -> Tensor | None:
    """Lower Cholesky factor, or None when the matrix is not positive definite to its precision.

    A pivot that lost all but its rounding noise would be a made-up number in the solution, so it
    counts as failed even where it happens to be positive.
    """
    lower_II, info = torch.linalg.cholesky_ex(matrix_II)
    noise = math.sqrt(len(matrix_II)) * torch.finfo(matrix_II.dtype).eps
    pivots_I = lower_II.diagonal() ** 2
    if int(info) != 0 or bool((pivots_I <= noise * matrix_II.diagonal()).any()):
        return None
    return lower_II
