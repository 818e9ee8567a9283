"""The second moment of a layer's inputs: streaming sum, and the factor of its inverse.

Shape suffixes: T tokens, I input features, R rows of one step, E Hessians of a stack. Knows tensors
and `Comm` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.calibration.cholesky import invert_factor_, invert_factors_
from sparsify.comm import Comm
from sparsify.errors import CalibrationError, InputError, NonFiniteError, SingularHessianError
from sparsify.kernels.gram import add_gram_, mirror_upper_, sum_dtype
from sparsify.kernels.precision import float32_products, times

_DAMPING_STEP = 10.0

_MAX_DAMPING = 1.0

_POWER_STEPS = 5

_FLIP_ROWS = 512  # bounds the memory of a flipped copy


class HessianSum:
    """Running sum of X^T X over calibration tokens; sums of several processes can be added.

    Memory: one (I, I) matrix, float64 on a CPU and float32 on a GPU (`kernels.gram`), of which the
    upper triangle is kept up to date.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        shape = (in_features, in_features)
        self._sum_II = torch.zeros(shape, dtype=sum_dtype(device), device=device)
        self.num_tokens = 0
        self.weight = 0.0
        """sum of the tokens' weights, by which the mean divides"""

    def add(self, inputs: Tensor, token_weights: Tensor | None = None) -> None:
        """Add the tokens of `inputs`, which must all be real tokens.

        Args:
            inputs: (..., I), any float dtype. Half precision is multiplied exactly, see
                `kernels.gram.add_gram_`.
            token_weights: (...), finite and 0 or more: how much each token counts. None: 1 each.
                With weights, inputs are scaled by their roots and multiplied in float32.

        Raises:
            InputError: a weight is negative or not finite, or there are not as many as tokens.

        Cost: T I^2 operations.
        """
        inputs_TI = inputs.detach().reshape(-1, inputs.shape[-1])
        weight = float(len(inputs_TI))
        if token_weights is not None:
            weights_T = token_weights.detach().reshape(-1).float()
            if len(weights_T) != len(inputs_TI):
                raise InputError(f"{len(weights_T)} token weights for {len(inputs_TI)} tokens")
            if not bool((torch.isfinite(weights_T) & (weights_T >= 0)).all()):
                raise InputError("token weights must be finite and 0 or more")
            weight = float(weights_T.sum(dtype=torch.float64))
            inputs_TI = inputs_TI.float() * weights_T.sqrt().unsqueeze(1)
        add_gram_(self._sum_II, inputs_TI)
        self.num_tokens += len(inputs_TI)
        self.weight += weight

    @property
    def num_columns(self) -> int:
        """I."""
        return len(self._sum_II)

    def empty(self) -> HessianSum:
        """A sum of no tokens for the same inputs."""
        return HessianSum(self.num_columns, self._sum_II.device)

    def eye(self) -> Tensor:
        """The mean of inputs that are independent and of size 1: float32 (I, I)."""
        return torch.eye(self.num_columns, device=self._sum_II.device)

    def merge(self, other: HessianSum) -> None:
        """Add the sums of `other`, in place."""
        self._sum_II += other._sum_II
        self.num_tokens += other.num_tokens
        self.weight += other.weight

    def tensors(self) -> Iterator[Tensor]:
        """The sum."""
        yield self._sum_II

    def is_finite(self) -> bool:
        """Whether every input so far was a number, and no square overflowed."""
        return bool(self._finite_I().all())

    def _finite_I(self) -> Tensor:
        """bool (I,): columns of numbers; one NaN or infinity in column j makes entry (j, j) one."""
        return torch.isfinite(self._sum_II.diagonal().float())

    def reduce(self, comm: Comm) -> None:
        """Add up the sums and token counts of all processes, on all of them."""
        comm.all_reduce_(self._sum_II)
        # float64 counts tokens exactly up to 2^53; float32 only up to 16.8 million.
        totals = torch.tensor(
            [self.num_tokens, self.weight], dtype=torch.float64, device=self._sum_II.device
        )
        comm.all_reduce_(totals)
        self.num_tokens, self.weight = int(totals[0]), float(totals[1])

    def mean(self) -> Tensor:
        """Mean of w x x^T, that is the sum over the sum of the weights: float32 (I, I).

        It is symmetric to the last bit.

        Raises:
            CalibrationError: no token was added, or none with a weight above 0.
            NonFiniteError: an input was NaN or infinite, or a square overflowed float32. After
                `reduce` every process raises it, whichever process met the value.
        """
        if self.num_tokens == 0:
            raise CalibrationError("no calibration token reached this layer; use more rows")
        if self.weight == 0:
            raise CalibrationError(f"all {self.num_tokens} calibration tokens have the weight 0")
        bad = (~self._finite_I()).nonzero().flatten()
        if len(bad):
            raise NonFiniteError(
                f"inputs hold NaN or infinity in {len(bad)} of {len(self._sum_II)} columns, first "
                f"column {int(bad[0])}; check the weights before this layer or use a wider dtype"
            )
        return mirror_upper_((self._sum_II / self.weight).float())


def row_energies(change_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """d H d^T of every row d, (O,): with H the mean of x x^T, its mean square output."""
    return ((change_OI @ hessian_II) * change_OI).sum(-1)


@dataclass(frozen=True)
class InverseFactor:
    """U with inverse(H + d I) = U^T U, and what it took to get it.

    Of a stack (`moments.stacked`) the tensors have a leading dimension, and the damping is one.
    """

    upper_II: Tensor
    """upper triangular, positive diagonal, contiguous; dtype of the Hessian (at least float32)"""
    damping: float
    """share of the mean diagonal that was added in the attempt that worked"""
    num_attempts: int
    """1 when the requested damping worked"""
    dead_columns: Tensor
    """bool (I,): inputs that were zero on every calibration token"""
    condition: float | None = None
    """estimate of the condition number of the damped Hessian (largest eigenvalue over smallest),
    from five steps of the power iteration at each end. It is never too high, and was 0.83 to 1.0
    of the true value where measured. In float32 a solution keeps about 7 - log10(condition)
    digits."""

    def tensors(self) -> Iterator[Tensor]:
        """The factor and the mask of its dead columns."""
        yield from (self.upper_II, self.dead_columns)


def inverse_factor(
    hessian_II: Tensor, damping: float, name: str,
    invert_: Callable[[Tensor], bool] = invert_factor_, option: str = "prune.damping",
) -> InverseFactor:  # fmt: skip
    """Upper Cholesky factor of the inverse of the damped Hessian, without forming the inverse.

    With J the flip of the order of columns: L = chol(J H J), R = J L J is upper triangular with
    H = R R^T, and U = R^-1 gives inverse(H) = U^T U. The factor is unique, so it is the one that
    SparseGPT and GPTQ get from chol(inverse(chol(H))), with one factorisation fewer to fail.

    Args:
        hessian_II: symmetric (I, I); not changed.
        damping: this share of the mean of the diagonal is added to the diagonal.
        name: layer, for messages.
        invert_: as `cholesky.invert_factor_`; what takes part in it has to call this together.
        option: that the damping comes from, for messages.

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

    Cost: I^3 / 3 multiplications and as many additions. Memory at the peak: the result and half a
    matrix besides the given one, which at 28,672 columns is 3.3 + 1.6 GB.
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
    with float32_products():
        for num_attempts, tried in enumerate(attempts, start=1):
            matrix_II = hessian_II.flip(0, 1)
            matrix_II.diagonal().add_(dead_I.flip(0)).add_(tried * scale)
            if not invert_(matrix_II):
                continue
            _flip_(matrix_II)
            condition = float(_condition(matrix_II, hessian_II, dead_I, tried * scale))
            return InverseFactor(matrix_II, tried, num_attempts, dead_I, condition)
    rank = int(torch.linalg.matrix_rank(hessian_II, hermitian=True))
    raise SingularHessianError(
        f"{name}: the Hessian is singular: the calibration data has rank {rank} where the layer "
        f"has {len(dead_I)} input columns (damping tried: "
        f"{', '.join(f'{value:g}' for value in attempts)}); use more or more varied calibration "
        f"rows, or a larger {option}"
    )


def inverse_factors(
    hessian_EII: Tensor, damping: float, names: Sequence[str], option: str = "prune.damping"
) -> list[InverseFactor]:
    """`inverse_factor` of each of a stack of Hessians, in about as many launches as of one.

    One that is singular with the damping asked for is factored again by itself: it gets the
    damping that it would get alone, or is refused in the same words.

    Args:
        hessian_EII: at least float32; not changed.
        damping, option: see `inverse_factor`.
        names: of the layers, for messages.

    Raises:
        NonFiniteError, SingularHessianError: see `inverse_factor`, of the first that is refused.

    Cost: that of E `inverse_factor`, with three times the stack in memory.
    """
    diagonal_EI = hessian_EII.diagonal(dim1=-2, dim2=-1).contiguous()
    dead_EI = diagonal_EI == 0
    added_E = damping * mean_alive(diagonal_EI, dead_EI).double()
    # Rounded once, as a number that is added to float32 is.
    added_E1 = added_E.to(hessian_EII.dtype).unsqueeze(-1)
    with float32_products():
        matrix_EII = hessian_EII.flip(-2, -1)
        matrix_EII.diagonal(dim1=-2, dim2=-1).add_(dead_EI.flip(-1)).add_(added_E1)
        is_sound_E = invert_factors_(matrix_EII)  # not where there is NaN or infinity either
        _flip_(matrix_EII)
        condition_E = _condition(matrix_EII, hessian_EII, dead_EI, added_E1)
    sound, conditions = torch.stack([is_sound_E.double(), condition_E]).tolist()
    return [
        InverseFactor(matrix_EII[index], damping, 1, dead_EI[index], conditions[index])
        if sound[index]
        else inverse_factor(hessian_EII[index], damping, name, option=option)
        for index, name in enumerate(names)
    ]


def mean_alive(diagonal_EI: Tensor, dead_EI: Tensor) -> Tensor:
    """(E,): what dampings are shares of, the mean over columns that are not dead; 1 without any."""
    num_alive_E = (~dead_EI).sum(-1)
    return torch.where(num_alive_E == 0, 1.0, diagonal_EI.sum(-1) / num_alive_E)


def _flip_(matrix_II: Tensor) -> None:
    """Reverse the order of rows and of columns, in place; of every matrix of a stack."""
    size = matrix_II.shape[-1]
    for start in range(0, size // 2, _FLIP_ROWS):
        stop = min(start + _FLIP_ROWS, size // 2)
        upper_RI = matrix_II[..., start:stop, :]
        lower_RI = matrix_II[..., size - stop : size - start, :]
        kept_RI = upper_RI.flip(-2, -1)
        upper_RI.copy_(lower_RI.flip(-2, -1))
        lower_RI.copy_(kept_RI)
    if size % 2:
        matrix_II[..., size // 2, :] = matrix_II[..., size // 2, :].flip(-1)


def _condition(
    upper_II: Tensor, hessian_II: Tensor, dead_I: Tensor, added: float | Tensor
) -> Tensor:
    """See `InverseFactor.condition`; float64, one of each of a stack, where `added` is (E, 1).

    Dead columns are left out, being decoupled from the rest. The power iterations start at the
    column that is largest, which no start at random could beat.
    """
    sizes_I = hessian_II.diagonal(dim1=-2, dim2=-1)
    inverse_sizes_I = torch.linalg.vector_norm(upper_II, dim=-2).masked_fill_(dead_I, 0.0)

    def damped(x_I: Tensor) -> Tensor:
        return times(hessian_II, x_I) + added * x_I

    def inverse(x_I: Tensor) -> Tensor:
        return times(upper_II.mT, times(upper_II, x_I))

    found = _largest_eigenvalue(damped, sizes_I) * _largest_eigenvalue(inverse, inverse_sizes_I)
    return found.masked_fill_(dead_I.all(-1), 1.0)


def _largest_eigenvalue(multiply: Callable[[Tensor], Tensor], sizes_I: Tensor) -> Tensor:
    """Rayleigh quotient after a few steps from the unit vector of the largest size, float64."""
    largest = sizes_I.argmax(-1, keepdim=True)
    product_I = torch.zeros_like(sizes_I).scatter_(-1, largest, 1.0)
    for _ in range(_POWER_STEPS):
        vector_I = product_I / torch.linalg.vector_norm(product_I, dim=-1, keepdim=True)
        product_I = multiply(vector_I)
    return torch.linalg.vecdot(vector_I, product_I).double()
