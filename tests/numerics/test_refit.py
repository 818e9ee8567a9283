"""The refit against normal equations, the teacher's target against brute-force least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsify.calibration.hessian import inverse_factor
from sparsify.calibration.moments import InputMoments
from sparsify.methods import Problem, PruneParams
from sparsify.methods._refit import damped_hessian, objective, refit
from sparsify.methods._target import shrinkage, teacher_target


def case(num_rows: int = 16, num_columns: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A float64 target, a random mask of half of it, a damped Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(target.shape, generator=generator) < 0.5
    mix = torch.randn(num_columns, num_columns, generator=generator, dtype=torch.float64)
    tokens = torch.randn(8 * num_columns, num_columns, generator=generator, dtype=torch.float64)
    inputs = tokens @ (mix / num_columns**0.5 + torch.eye(num_columns, dtype=torch.float64))
    return target, mask, damped_hessian(inputs.T @ inputs / len(inputs), 0.01, torch.float64)


def exact(target: Tensor, mask: Tensor, damped: Tensor) -> Tensor:
    """Normal equations of every row on its own mask."""
    result = torch.zeros_like(target)
    for row, keep in enumerate(mask):
        result[row, keep] = torch.linalg.solve(
            damped[keep][:, keep], (damped[keep] @ target[row])[:, None]
        )[:, 0]
    return result


def test_reaches_the_normal_equations() -> None:
    target, mask, damped = case()
    expected = exact(target, mask, damped)
    found = refit(target, target, mask, damped, iterations=60)
    # About 16 unknowns per row: conjugate gradients end there but for rounding. Measured 4e-15.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    best, start = (objective(z, target, damped).sum() for z in (expected, target * mask))
    after = [objective(refit(target, target, mask, damped, n), target, damped).sum()
             for n in (10, 20)]  # fmt: skip
    # The condition is 190; measured 7e-5 and 3e-12 of the error that can be removed.
    assert after[0] - best < 1e-3 * (start - best)
    assert after[1] - best < 1e-9 * (start - best)


def test_float32_reaches_the_optimum_to_rounding() -> None:
    target, mask, damped = case(64, 128)
    best = objective(exact(target, mask, damped), target, damped)
    found = refit(target.float(), target.float(), mask, damped.float(), iterations=80)
    assert found.dtype == torch.float32
    # The error is second order in rounding; measured worst row 1 + 4e-13.
    assert (objective(found.double(), target, damped) / best).max() < 1 + 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_step_lowers_every_row(dtype: torch.dtype) -> None:
    target, mask, damped = (x.to(dtype) if x.is_floating_point() else x for x in case())
    errors = [
        objective(refit(target, target, mask, damped, n).double(), target.double(), damped.double())
        for n in range(25)
    ]
    for before, after in itertools.pairwise(errors):
        # Rows that have converged move within rounding, measured 4e-15 of the first error.
        assert (after <= before + 1e-12 * errors[0]).all()
    assert (errors[-1] < errors[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_worse_than_the_start(dtype: torch.dtype) -> None:
    """Also from the optimum itself, where every step is made of rounding noise."""
    target, mask, damped = case(64, 32)
    start = exact(target, mask, damped).to(dtype)
    found = refit(start, target.to(dtype), mask, damped.to(dtype), iterations=200)
    before, after = (objective(z.double(), target, damped) for z in (start, found))
    # "Worse" is judged in `dtype`; measured 1 + 2e-13 in float32 and 1 + 4e-16 in float64.
    assert (after <= before * (1 + 10 * torch.finfo(dtype).eps)).all()


def test_nothing_to_do_is_no_nan() -> None:
    target, mask, damped = case()
    mask[0] = False  # a row without weights
    target[1] = 0.0  # a row that is reached already
    mask[2] = True  # a row that can reach its target
    found = refit(target, target, mask, damped, iterations=50)
    assert torch.isfinite(found).all()
    assert not found[:2].any()
    assert torch.equal(found[2], target[2])
    assert refit(target[:0], target[:0], mask[:0], damped, 5).shape == (0, 32)


def test_off_the_mask_are_exact_zeros_and_arguments_are_kept() -> None:
    target, mask, damped = case()
    copies = [x.clone() for x in (target, mask, damped)]
    found = refit(target, target, mask, damped, iterations=10)
    assert not found[~mask].any() and found[mask].all()
    assert all(torch.equal(x, y) for x, y in zip((target, mask, damped), copies, strict=True))
    assert torch.equal(refit(target, target, mask, damped, 0), target * mask)


def test_rows_do_not_feel_each_other() -> None:
    target, mask, damped = case()
    whole = refit(target, target, mask, damped, iterations=12)
    scaled = target * torch.logspace(-9, 9, 16, dtype=torch.float64).unsqueeze(1)
    together = refit(scaled, scaled, mask, damped, iterations=12)
    back = together / torch.logspace(-9, 9, 16, dtype=torch.float64).unsqueeze(1)
    # Rounding of the same steps; measured 1.7e-14.
    torch.testing.assert_close(back, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dead", [[], [3, 7], list(range(8))])
def test_damped_hessian_is_what_the_factor_inverts(dead: list[int]) -> None:
    inputs = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[:, dead] = 0.0
    hessian = inputs.T @ inputs / 50
    upper = inverse_factor(hessian, 0.02, "layer").upper_II
    damped = damped_hessian(hessian, 0.02, torch.float64)
    eye = torch.eye(8, dtype=torch.float64)
    # Measured 4e-16.
    torch.testing.assert_close(damped @ (upper.T @ upper), eye, rtol=0, atol=1e-12)


class TestTeacherTarget:
    """200 tokens: x of the pruned model, y of the dense one, and the gap of the residual stream."""

    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        weight, gap = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((5, 12), (200, 5))
        )
        dense = torch.randn(200, 12, generator=generator, dtype=torch.float64)
        noise = torch.randn(200, 12, generator=generator, dtype=torch.float64)
        return weight, dense + 0.3 * noise + 0.1 * dense.roll(1, 1), dense, gap

    def problem(
        self, weight: Tensor, x: Tensor, y: Tensor, gap: Tensor | None,
        a: float = 1.0, b: float = 1.0,
    ) -> Problem:  # fmt: skip
        """Of a layer that writes to the residual stream; without a gap, of another one."""
        if gap is None:
            return Problem("layer", weight, InputMoments(x.T @ x / 200, 200, y.T @ x / 200))
        wanted = a * y @ weight.double().T + b * gap
        return Problem("layer", weight, InputMoments(x.T @ x / 200, 200), wanted.T @ x / 200)

    @pytest.mark.parametrize(("teacher", "residual"), [(1.0, 1.0), (0.3, 0.8), (0, 1), (1, 0)])
    def test_is_the_least_squares_solution(self, teacher: float, residual: float) -> None:
        weight, x, y, gap = self.tokens()
        params = PruneParams(damping=0.05, teacher_share=teacher, residual_share=residual)
        found = teacher_target(self.problem(weight, x, y, gap, teacher, residual), params)
        trust = shrinkage(200, 12)
        assert trust == pytest.approx(200 / (200 + 15 * 12))
        # Stated objective, written as one tall system: the tokens, then the ridge's rows.
        ridge = 0.05 * float((x.T @ x / 200).diagonal().mean())
        wanted = x @ weight.T + trust * (teacher * (y - x) @ weight.T + residual * gap)
        pull = (200 * ridge) ** 0.5
        system = torch.cat([x, pull * torch.eye(12, dtype=x.dtype)])
        goals = torch.cat([wanted, pull * weight.T])
        expected = torch.linalg.lstsq(system, goals).solution.T
        # Measured 3e-15.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)

    @pytest.mark.parametrize(("a", "b"), [(0.7, 0.3), (1.0, 0.0), (0.0, 0.6)])
    def test_is_the_formula_of_three_moments(self, a: float, b: float) -> None:
        """T = W + [a W (G - H) + b C] H_l^-1; b = 0 for a layer that adds to no stream."""
        weight, x, y, gap = self.tokens()
        params = PruneParams(teacher_share=a, residual_share=b)
        hessian, cross, residual = x.T @ x / 200, y.T @ x / 200, gap.T @ x / 200
        inverse = damped_hessian(hessian, params.damping, torch.float64).inverse()
        for of, share in ((gap, b), (None, 0.0)):
            found = teacher_target(self.problem(weight, x, y, of, a, b), params)
            pull = a * weight @ (cross - hessian) + share * residual
            expected = weight + shrinkage(200, 12) * pull @ inverse
            # Measured 1.4e-15.
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)

    def test_without_shares_or_without_a_gap_it_is_the_weight(self) -> None:
        weight, x, y, gap = self.tokens()
        none = PruneParams(teacher_share=0.0, residual_share=0.0)
        for of in (gap, None):
            problem = self.problem(weight, x, y, of, 0.0, 0.0)
            assert torch.equal(teacher_target(problem, none), weight)
        same = teacher_target(self.problem(weight, x, x, None), PruneParams())
        assert torch.equal(same, weight)

    def test_many_tokens_bring_the_dense_output_back(self) -> None:
        """An invertible change of the inputs can be undone, up to damping and shrinkage."""
        weight, _, y, _ = self.tokens()
        mix = torch.eye(12, dtype=torch.float64) + 0.2 * torch.ones(12, 12, dtype=torch.float64)
        problem = self.problem(weight, y @ mix, y, None)
        assert problem.moments is not None
        problem.moments.num_tokens = 10**9
        found = teacher_target(problem, PruneParams(damping=1e-9, teacher_share=1.0))
        # The damping pulls by 1e-9 and the shrinkage by 2e-7; measured 4e-8.
        torch.testing.assert_close(found, weight @ mix.inverse().T, rtol=0, atol=1e-6)

    def test_dead_columns_are_zero_and_still_teach(self) -> None:
        """What the dense model has in a column that is dead now, the other columns carry."""
        weight, x, y, _ = self.tokens()
        x = x.clone()
        x[:, 4] = 0.0
        x[:, 5] = y[:, 4]
        y[:, 5] = 0.0
        problem = self.problem(weight, x, y, None)
        assert problem.moments is not None
        problem.moments.num_tokens = 10**9
        found = teacher_target(problem, PruneParams(damping=1e-6, teacher_share=1.0))
        assert not found[:, 4].any()
        # Least squares on the live columns alone; the damping pulls by 1e-6, measured 3e-6.
        live = [column for column in range(12) if column != 4]
        expected = torch.linalg.lstsq(x[:, live], y @ weight.T).solution.T
        torch.testing.assert_close(found[:, live], expected, rtol=0, atol=1e-4)

    def test_bfloat16_weight_gives_a_float32_target(self) -> None:
        weight, x, y, gap = self.tokens()
        problem = self.problem(weight.bfloat16(), x, y, gap)
        exact_target = teacher_target(
            self.problem(weight.bfloat16().double(), x, y, gap), PruneParams()
        )
        found = teacher_target(problem, PruneParams())
        assert found.dtype == torch.float32
        # Measured 9e-8.
        torch.testing.assert_close(found.double(), exact_target, rtol=0, atol=1e-5)
