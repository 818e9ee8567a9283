"""Sums of x x^T and their factors: weights, symmetry, memory layout, condition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.calibration.hessian import HessianSum, inverse_factor, inverse_factors
from sparsify.comm import Comm
from sparsify.errors import CalibrationError, InputError, NonFiniteError, SingularHessianError


def tokens(num_tokens: int, num_columns: int, seed: int = 0) -> Tensor:
    """float64 inputs with strongly correlated columns of sizes from 1 to 10."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_tokens, num_columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(num_columns, num_columns, generator=generator, dtype=torch.float64)
    mixed = drawn @ (mix / num_columns**0.5 + torch.eye(num_columns, dtype=torch.float64))
    return mixed * torch.logspace(0, 1, num_columns, dtype=torch.float64)


def moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


class TestSum:
    def test_weighted_mean(self) -> None:
        inputs = tokens(200, 40)
        weights = torch.rand(200, generator=torch.Generator().manual_seed(1))
        total = HessianSum(40, "cpu")
        total.add(inputs[:120].reshape(2, 60, 40), weights[:120].reshape(2, 60))
        total.add(inputs[120:], weights[120:])
        expected = (inputs * weights.double()[:, None]).T @ inputs / weights.double().sum()
        # float32 sums of 200 products; measured 6.8e-5 on entries of up to 232.
        torch.testing.assert_close(total.mean().double(), expected, rtol=0, atol=5e-4)
        assert total.num_tokens == 200
        assert total.weight == pytest.approx(float(weights.double().sum()))

    def test_scale_of_the_weights_does_not_matter_and_ones_are_none(self) -> None:
        inputs = tokens(100, 16).float()
        means = []
        for weight in (None, 1.0, 4.0):
            total = HessianSum(16, "cpu")
            total.add(inputs, None if weight is None else torch.full((100,), weight))
            means.append(total.mean())
        # 4 and its root are powers of two: no rounding.
        assert torch.equal(means[0], means[1]) and torch.equal(means[0], means[2])

    def test_weight_zero_leaves_a_token_out_but_counts_it(self) -> None:
        inputs = tokens(30, 8)
        total, part = HessianSum(8, "cpu"), HessianSum(8, "cpu")
        total.add(inputs, (torch.arange(30) < 20).float())
        part.add(inputs[:20])
        torch.testing.assert_close(total.mean(), part.mean(), rtol=1e-6, atol=1e-6)
        assert total.num_tokens == 30 and total.weight == 20

    def test_merged_and_reduced_sums_are_the_sum(self) -> None:
        inputs = tokens(90, 12)
        whole, left, right = (HessianSum(12, "cpu") for _ in range(3))
        whole.add(inputs, torch.arange(90.0))
        left.add(inputs[:50], torch.arange(50.0))
        right.add(inputs[50:], torch.arange(50.0, 90.0))
        left.merge(right)
        left.reduce(Comm.single())
        torch.testing.assert_close(left.mean(), whole.mean(), rtol=1e-5, atol=1e-5)
        assert (left.num_tokens, left.weight) == (90, 89 * 90 / 2)

    def test_mean_is_symmetric_to_the_last_bit_and_leaves_the_sum(self) -> None:
        total = HessianSum(70, "cpu")
        total.add(tokens(64, 70))
        first = total.mean()
        assert torch.equal(first, first.T) and torch.equal(total.mean(), first)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (torch.tensor([1.0, -1.0, 1.0]), "0 or more"),
            (torch.tensor([1.0, float("nan"), 1.0]), "finite"),
            (torch.ones(2), "2 token weights for 3 tokens"),
        ],
        ids=["negative", "nan", "too few"],
    )
    def test_bad_weights_are_refused(self, weights: Tensor, message: str) -> None:
        total = HessianSum(4, "cpu")
        with pytest.raises(InputError, match=message):
            total.add(torch.ones(3, 4), weights)
        assert total.num_tokens == 0

    def test_no_weight_at_all_is_an_error(self) -> None:
        total = HessianSum(4, "cpu")
        total.add(torch.ones(3, 4), torch.zeros(3))
        with pytest.raises(CalibrationError, match="all 3 calibration tokens have the weight 0"):
            total.mean()

    def test_is_finite_tells_what_mean_would_raise(self) -> None:
        total = HessianSum(4, "cpu")
        total.add(torch.ones(3, 4))
        assert total.is_finite()
        total.add(torch.tensor([[1.0, 1e30, 0.0, 0.0]]))
        assert not total.is_finite()
        with pytest.raises(NonFiniteError, match="first column 1"):
            total.mean()


class TestFactor:
    # 256 columns are inverted by one solve; from 257 on in halves; rows are flipped 512 at a time.
    @pytest.mark.parametrize("size", [1, 2, 7, 256, 257, 601, 1100])
    def test_is_the_factor_of_the_inverse_at_every_size(self, size: int) -> None:
        hessian = moment(tokens(2 * size + 8, size))
        given = hessian.clone()
        factor = inverse_factor(hessian, 0.01, "layer")
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        upper = factor.upper_II
        assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
        # Processes send the factor to each other as it lies in memory.
        assert upper.is_contiguous() and torch.equal(hessian, given)
        eye = torch.eye(size, dtype=torch.float64)
        # Condition of about 700 in float64; measured 8.7e-15.
        torch.testing.assert_close(upper @ damped @ upper.T, eye, rtol=0, atol=1e-12)

    def test_float32_is_as_exact_as_the_condition_lets_it_be(self) -> None:
        hessian = moment(tokens(1400, 601))
        exact = inverse_factor(hessian, 0.01, "layer").upper_II
        factor = inverse_factor(hessian.float(), 0.01, "layer")
        error = float((factor.upper_II.double() - exact).norm() / exact.norm())
        assert error < 5e-6  # measured 5.7e-7

    def test_dead_columns_are_decoupled(self) -> None:
        # So large that the 1 on the diagonal of a dead column is by far the smallest eigenvalue.
        inputs = 100 * tokens(100, 20)
        inputs[:, [0, 7, 19]] = 0.0
        factor = inverse_factor(moment(inputs), 0.01, "layer")
        alive = ~factor.dead_columns
        part = inverse_factor(moment(inputs[:, alive]), 0.01, "layer")
        torch.testing.assert_close(
            factor.upper_II[alive][:, alive], part.upper_II, rtol=0, atol=1e-12
        )
        assert factor.condition == pytest.approx(part.condition)
        assert not factor.upper_II[~alive][:, alive].any()
        assert not factor.upper_II[alive][:, ~alive].any()

    def test_the_given_matrix_survives_a_failed_attempt(self) -> None:
        hessian = torch.eye(300, dtype=torch.float64)
        hessian[0, 1] = hessian[1, 0] = 1.05
        given = hessian.clone()
        factor = inverse_factor(hessian, 0.01, "layer")
        assert factor.num_attempts == 2 and torch.equal(hessian, given)
        with pytest.raises(SingularHessianError):
            inverse_factor(hessian, 0.0, "layer")
        assert torch.equal(hessian, given)

    def test_nothing_but_dead_columns(self) -> None:
        factor = inverse_factor(torch.zeros(5, 5), 0.01, "layer")
        assert factor.dead_columns.all() and factor.condition == 1.0


class TestStackOfFactors:
    """The factors of several Hessians at once are those of each by itself."""

    @pytest.mark.parametrize("size", [7, 40, 601])
    def test_has_the_bits_of_each(self, size: int) -> None:
        """On a CPU. The mean diagonal without dead columns is summed in another order, and so are
        the products of the condition, which is an estimate."""
        inputs = torch.stack([tokens(2 * size, size, seed) for seed in range(4)])
        inputs[2, :, [0, size - 1]] = 0.0
        inputs[3] = 0.0
        hessians = torch.stack([moment(of_one).float() for of_one in inputs])
        given = hessians.clone()
        found = inverse_factors(hessians, 0.01, ["a", "b", "c", "d"])
        assert torch.equal(hessians, given)
        for index, (factor, hessian) in enumerate(zip(found, hessians, strict=True)):
            alone = inverse_factor(hessian, 0.01, "layer")
            assert index == 2 or torch.equal(factor.upper_II, alone.upper_II)
            torch.testing.assert_close(factor.upper_II, alone.upper_II, rtol=0, atol=1e-6)
            assert torch.equal(factor.dead_columns, alone.dead_columns)
            assert (factor.damping, factor.num_attempts) == (0.01, 1)
            assert factor.condition == pytest.approx(alone.condition, rel=1e-4)

    def test_one_that_is_singular_takes_more_damping_and_the_others_do_not(self) -> None:
        hessians = torch.eye(300, dtype=torch.float64).repeat(3, 1, 1)
        hessians[1, 0, 1] = hessians[1, 1, 0] = 1.05
        found = inverse_factors(hessians, 0.01, ["a", "b", "c"])
        assert [(f.damping, f.num_attempts) for f in found] == [(0.01, 1), (0.1, 2), (0.01, 1)]
        alone = inverse_factor(hessians[1], 0.01, "b")
        assert torch.equal(found[1].upper_II, alone.upper_II)

    def test_one_that_is_refused_is_named_in_the_same_words(self) -> None:
        hessians = torch.stack([moment(tokens(count, 40)) for count in (90, 90, 20)])
        with pytest.raises(SingularHessianError) as alone:
            inverse_factor(hessians[2], 0.0, "c")
        with pytest.raises(SingularHessianError) as together:
            inverse_factors(hessians, 0.0, ["a", "b", "c"])
        assert str(together.value) == str(alone.value) and "c: the Hessian is" in str(alone.value)
        for value in (torch.nan, torch.inf):
            hessians[1, 5, 7] = hessians[1, 7, 5] = value
            with pytest.raises(NonFiniteError, match="b: the Hessian holds NaN or infinity"):
                inverse_factors(hessians[:2], 0.01, ["a", "b"])


class TestCondition:
    @pytest.mark.parametrize("damping", [1e-4, 0.01, 0.3])
    @pytest.mark.parametrize("kind", ["correlated", "few tokens", "even", "diagonal", "outlier"])
    def test_is_near_and_never_above_the_condition(self, kind: str, damping: float) -> None:
        if kind == "diagonal":
            hessian = torch.diag(torch.logspace(-3, 2, 120, dtype=torch.float64))
        elif kind == "even":
            hessian = moment(torch.randn(2000, 120, generator=torch.Generator().manual_seed(0)))
            hessian = hessian.double()
        else:
            hessian = moment(tokens(30 if kind == "few tokens" else 500, 120))
        if kind == "outlier":
            hessian[7] *= 100
            hessian[:, 7] *= 100
        factor = inverse_factor(hessian, damping, "layer")
        eye = torch.eye(120, dtype=torch.float64)
        exact = float(torch.linalg.cond(hessian + damping * hessian.diagonal().mean() * eye))
        assert factor.condition is not None
        # Measured 0.83 (even) to 1.0.
        assert 0.75 * exact <= factor.condition <= exact * (1 + 1e-9)

    def test_does_not_depend_on_the_scale(self) -> None:
        hessian = moment(tokens(100, 50))
        one, other = (
            inverse_factor(hessian * scale, 0.01, "layer").condition for scale in (1.0, 2.0**-40)
        )
        assert one == pytest.approx(other)
