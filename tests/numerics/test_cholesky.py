"""Inverse Cholesky factors whose work is cut into lanes: against float64, and by what they share.

Several real processes are in tests/integration/test_factor_distributed.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.calibration import cholesky
from sparsify.calibration.cholesky import (
    even_slices,
    invert_factor_,
    invert_factor_together_,
)
from sparsify.comm import Comm
from tests.numerics.test_hessian import moment, tokens

LANES = Comm.single(is_fixed=True)  # eight lanes, all of this process


def damped(size: int) -> Tensor:
    matrix_II = moment(tokens(2 * size + 8, size))
    return matrix_II + 0.01 * matrix_II.diagonal().mean() * torch.eye(size, dtype=torch.float64)


# Panels of 512, a last one of one column, slices that are empty, leaves of 256.
@pytest.mark.parametrize("size", [1, 7, 100, 513, 1100])
def test_lanes_make_the_inverse_of_the_factor(size: int) -> None:
    matrix_II = damped(size)
    lower_II, alone_II = matrix_II.clone(), matrix_II.clone()
    assert invert_factor_together_(lower_II, LANES) and invert_factor_(alone_II)
    assert torch.equal(lower_II, lower_II.tril()) and lower_II.is_contiguous()
    eye = torch.eye(size, dtype=torch.float64)
    # Measured as for one process: 8.7e-15 at a condition of about 700.
    torch.testing.assert_close(lower_II @ matrix_II @ lower_II.T, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(lower_II, alone_II, rtol=0, atol=1e-12)


def test_lanes_are_as_exact_in_float32_as_one_piece() -> None:
    exact = damped(1100)
    together, alone = exact.float(), exact.float()
    assert invert_factor_(exact) and invert_factor_(alone)
    assert invert_factor_together_(together, LANES)
    errors = [
        float((found.double() - exact).norm() / exact.norm()) for found in (together, alone)
    ]  # fmt: skip
    assert errors[0] < 3 * errors[1] + 1e-7


@pytest.mark.parametrize("bad", [0, 40, 100, 149], ids=["first", "panel", "middle", "last"])
@pytest.mark.parametrize("kind", ["negative", "noise", "nan"])
def test_a_pivot_that_is_none_is_seen_in_every_panel(
    bad: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cholesky, "_PANEL", 40)
    matrix_II = damped(150).float()
    good = matrix_II.clone()
    if kind == "noise":  # a column that is another one but for its last bits
        other = (bad + 75) % 150
        matrix_II[bad] = matrix_II[other]
        matrix_II[:, bad] = matrix_II[:, other]
        matrix_II[bad, bad] = matrix_II[other, other] * (1 + 1e-7)
    else:
        matrix_II[bad, bad] = -1.0 if kind == "negative" else float("nan")
    assert not invert_factor_together_(matrix_II.clone(), LANES)
    assert not invert_factor_(matrix_II)
    assert invert_factor_together_(good, LANES)


def test_slices_of_the_inverse_are_even() -> None:
    for size, num_slices in ((14336, 8), (14336, 3), (28672, 32), (8192, 2)):
        slices = even_slices(size, num_slices)
        assert [start for start, _ in slices] == [0, *(stop for _, stop in slices[:-1])]
        assert len(slices) == num_slices and slices[-1][1] == size
        work = [(size - start) ** 3 - (size - stop) ** 3 for start, stop in slices]
        assert max(work) < 1.06 * size**3 / num_slices, (size, num_slices)
    assert even_slices(5, 4)[-1][1] == 5
