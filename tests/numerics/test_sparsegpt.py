"""SparseGPT against a slow float64 oracle written from the paper, and its Hessian and factor.

The oracle is optimal brain surgery as stated in SparseGPT (arXiv:2301.00774), section 3 and
equations 1 and 3: explicit inverse Hessian of the columns not yet visited, shrunk after each
column by Gaussian elimination of its row and column. No Cholesky factor, blocks or lazy updates.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.calibration.hessian import HessianSum, inverse_factor
from sparsify.calibration.moments import InputMoments
from sparsify.comm import Comm
from sparsify.errors import CalibrationError, InputError, NonFiniteError, SingularHessianError
from sparsify.methods import Method, Problem, PruneParams, Solution, get_method
from sparsify.pattern import Pattern

PATTERNS = ["2:4", "4:8", "1:2", "1:4", "unstructured:0.5", "unstructured:0.3"]
SPARSEGPT = get_method("sparsegpt")


def layer(num_rows: int = 12, num_columns: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 weight and the inputs of a layer, with strongly correlated columns."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(num_columns, num_columns, generator=generator, dtype=torch.float64)
    tokens = torch.randn(6 * num_columns, num_columns, generator=generator, dtype=torch.float64)
    return weight, tokens @ (mix / num_columns**0.5 + torch.eye(num_columns, dtype=mix.dtype))


def second_moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def run(
    method: Method,
    weight: Tensor,
    hessian: Tensor | None,
    pattern: Pattern,
    params: PruneParams,
    name: str = "layer",
) -> Solution:
    """Solve a layer of which only the weight and the Hessian are known."""
    moments = None if hessian is None else InputMoments(hessian, num_tokens=6 * len(hessian))
    return method.solve(Problem(name, weight, moments), pattern, params)


def oracle(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    damping: float,
    block_size: int,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One row at a time, one column at a time, with the inverse Hessian spelled out."""
    if allowed is None:
        allowed = torch.ones(weight.shape, dtype=torch.bool)
    num_rows, num_columns = weight.shape
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    damped = hessian + torch.diag(dead.double() + damping * diagonal[~dead].mean())
    result, keep = weight.clone(), torch.zeros(weight.shape, dtype=torch.bool)
    for row in range(num_rows):
        w = result[row]
        w[dead] = 0.0
        inverse = torch.linalg.inv(damped)  # of the columns from `column` on
        for column in range(num_columns):
            if pattern.is_structured and column % pattern.m == 0:
                chosen = range(column, column + pattern.m)
                num_kept = pattern.n
            elif not pattern.is_structured and column % block_size == 0:
                chosen = range(column, min(column + block_size, num_columns))
                num_kept = pattern.num_kept(chosen.stop) - pattern.num_kept(chosen.start)
            else:
                chosen = range(0)
            if chosen:
                # Saliency of k: w_k^2 / [H_F^-1]_kk with F the columns from k on.
                saliency = {}
                for k in (k for k in chosen if allowed[row, k]):
                    remaining = torch.linalg.inv(damped[k:, k:])
                    saliency[k] = float(w[k] ** 2 / remaining[0, 0])
                best = sorted(saliency, key=lambda k: (-saliency[k], k))[:num_kept]
                keep[row, best] = True
            if not keep[row, column]:
                w[column:] -= w[column] / inverse[0, 0] * inverse[:, 0].clone()
                w[column] = 0.0
            inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return result, keep


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("with_dead", [False, True])
def test_equals_the_oracle(text: str, with_dead: bool) -> None:
    pattern = Pattern.parse(text)
    weight, inputs = layer()
    if with_dead:
        inputs[:, [3, 8, 9, 10, 40]] = 0.0
    hessian = second_moment(inputs)
    params = PruneParams(damping=0.01, block_size=16)
    expected, keep = oracle(weight, hessian, pattern, 0.01, 16)
    solution = run(SPARSEGPT, weight, hessian, pattern, params)
    assert torch.equal(solution.keep_mask_OI, keep)
    assert solution.num_dead_columns == 5 * with_dead and solution.damping == 0.01
    # float64 on both sides; measured worst difference 6e-15.
    torch.testing.assert_close(solution.weight_OI, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", ["2:4", "4:8", "unstructured:0.5"])
@pytest.mark.parametrize("is_fixed", [False, True])
def test_equals_the_oracle_under_a_given_mask(text: str, is_fixed: bool) -> None:
    pattern, (weight, inputs) = Pattern.parse(text), layer()
    hessian, params = second_moment(inputs), PruneParams(damping=0.01, block_size=16)
    if is_fixed:
        other, _ = layer(seed=1)
        allowed = run(get_method("magnitude"), other, None, pattern, params).keep_mask_OI
    else:
        allowed = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.7
    # With as many allowed as may be kept, the oracle's choice is the given mask.
    expected, keep = oracle(weight, hessian, pattern, 0.01, 48 if is_fixed else 16, allowed)
    problem = Problem("layer", weight, InputMoments(hessian, 288), None, allowed, is_fixed)
    solution = SPARSEGPT.solve(problem, pattern, params)
    assert torch.equal(solution.keep_mask_OI, keep)
    assert torch.equal(keep, allowed) == is_fixed
    # float64 on both sides; measured worst difference 8e-15.
    torch.testing.assert_close(solution.weight_OI, expected, rtol=0, atol=1e-12)


def test_float32_finds_the_mask_of_float64() -> None:
    weight, inputs = layer(num_rows=64, num_columns=128)
    hessian = second_moment(inputs)
    pattern, params = Pattern.parse("2:4"), PruneParams()
    exact = run(SPARSEGPT, weight, hessian, pattern, params)
    rounded = run(SPARSEGPT, weight.float(), hessian.float(), pattern, params)
    # 2,048 groups; none differed when measured. A flipped near-tie would change one group.
    same = (exact.keep_mask_OI == rounded.keep_mask_OI).reshape(64, -1, 4).all(-1)
    assert same.float().mean() >= 0.999
    # Measured worst difference 2.1e-6, on weights of up to 4.0.
    rows = same.all(1)
    torch.testing.assert_close(
        rounded.weight_OI[rows].double(), exact.weight_OI[rows], rtol=0, atol=1e-5
    )


def test_output_error_is_lowest_of_all_methods_and_compensation_helps() -> None:
    weight, inputs = layer(num_rows=32)
    hessian, pattern = second_moment(inputs), Pattern.parse("2:4")

    def output_error(method: Method) -> float:
        pruned = run(method, weight, hessian, pattern, PruneParams()).weight_OI
        return float(((pruned - weight) @ inputs.T).square().sum())

    # Measured 0.68 of Wanda's.
    rivals = [output_error(get_method(name)) for name in ("wanda", "magnitude")]
    assert output_error(SPARSEGPT) < 0.75 * min(rivals)


def test_diagonal_hessian_without_damping_gives_wanda_and_no_compensation() -> None:
    weight, inputs = layer(num_rows=40)
    diagonal = torch.diag(second_moment(inputs).diagonal())
    for text in ("2:4", "4:8"):
        pattern, params = Pattern.parse(text), PruneParams(damping=0.0)
        wanda = run(get_method("wanda"), weight, diagonal, pattern, params)
        solution = run(SPARSEGPT, weight, diagonal, pattern, params)
        assert torch.equal(solution.keep_mask_OI, wanda.keep_mask_OI)
        assert torch.equal(solution.weight_OI, wanda.weight_OI)


def test_correlated_twin_column_takes_over_the_pruned_weight() -> None:
    """Columns 1 and 3 carry the same input, so pruning 1 must double 3 and lose nothing."""
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).double()
    inputs[:, 3] = inputs[:, 1]
    weight = torch.tensor([[5.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    params = PruneParams(damping=1e-9)
    solution = run(SPARSEGPT, weight, second_moment(inputs), Pattern.parse("2:4"), params)
    # The damping pulls by 1e-9 relative to the Hessian.
    expected = torch.tensor([[5.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(solution.weight_OI, expected, rtol=0, atol=1e-6)


def test_block_size_must_hold_whole_groups() -> None:
    weight, inputs = layer()
    params = PruneParams(block_size=130)
    with pytest.raises(InputError, match=r"block_size=130: must be a multiple of 4.*128"):
        run(SPARSEGPT, weight, second_moment(inputs), Pattern.parse("2:4"), params)


@pytest.mark.parametrize(
    "fields", [{"damping": -0.1}, {"damping": float("nan")}, {"block_size": 0}]
)
def test_params_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        PruneParams(**fields)


class TestHessian:
    def test_many_batches_and_ranks_equal_one(self) -> None:
        _, inputs = layer()
        whole = HessianSum(48, "cpu")
        whole.add(inputs.reshape(2, -1, 48))
        parts = [HessianSum(48, "cpu") for _ in range(3)]
        for index, batch in enumerate(inputs.split(37)):
            parts[index % 3].add(batch)
        merged = torch.stack([part.mean().double() * part.num_tokens for part in parts]).sum(0)
        assert sum(part.num_tokens for part in parts) == whole.num_tokens == 288
        # float32 sums of 288 products, entries up to 3.0; measured worst 7.7e-7.
        torch.testing.assert_close(
            (merged / 288).float(),
            whole.mean(),
            rtol=0,
            atol=5e-6,
        )
        torch.testing.assert_close(whole.mean().double(), second_moment(inputs), rtol=0, atol=5e-6)

    def test_reduce_of_one_process_changes_nothing(self) -> None:
        total = HessianSum(48, "cpu")
        total.add(layer()[1])
        before = total.mean()
        total.reduce(Comm.single())
        assert torch.equal(total.mean(), before) and total.num_tokens == 288

    def test_bfloat16_inputs_are_multiplied_exactly(self) -> None:
        inputs = layer()[1].bfloat16()
        total = HessianSum(48, "cpu")
        total.add(inputs)
        torch.testing.assert_close(
            total.mean().double(), second_moment(inputs.double()), rtol=0, atol=5e-6
        )

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
    def test_non_finite_input_is_found(self, value: float) -> None:
        total = HessianSum(48, "cpu")
        inputs = layer()[1]
        inputs[3, 11] = value
        total.add(inputs)
        with pytest.raises(NonFiniteError, match="1 of 48 columns, first column 11"):
            total.mean()

    def test_no_token_is_an_error(self) -> None:
        with pytest.raises(CalibrationError, match="no calibration token"):
            HessianSum(4, "cpu").mean()


class TestInverseFactor:
    def test_is_the_upper_cholesky_factor_of_the_inverse(self) -> None:
        hessian = second_moment(layer()[1])
        factor = inverse_factor(hessian, 0.01, "layer")
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48, dtype=torch.float64)
        expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        # Measured 9e-15.
        torch.testing.assert_close(factor.upper_II, expected, rtol=0, atol=1e-12)
        assert (factor.damping, factor.num_attempts) == (0.01, 1)
        assert not factor.dead_columns.any()
        assert torch.equal(hessian, second_moment(layer()[1])), "the Hessian was changed"

    def test_fewer_tokens_than_columns_work_with_damping(self) -> None:
        hessian = second_moment(layer()[1][:10]).float()
        factor = inverse_factor(hessian, 0.01, "layer")
        assert factor.num_attempts == 1 and bool(torch.isfinite(factor.upper_II).all())

    def test_damping_grows_until_the_factor_exists_and_is_recorded(self) -> None:
        # Smallest eigenvalue -0.05 of a matrix with mean diagonal 1: 0.01 is too little, 0.1 does.
        hessian = torch.eye(8, dtype=torch.float64)
        hessian[0, 1] = hessian[1, 0] = 1.05
        factor = inverse_factor(hessian, 0.01, "layer")
        assert factor.damping == pytest.approx(0.1) and factor.num_attempts == 2
        solution = run(SPARSEGPT, 
            torch.randn(3, 8, dtype=torch.float64), hessian, Pattern.parse("2:4"),
            PruneParams(damping=0.01), "layer",
        )  # fmt: skip
        assert solution.damping == pytest.approx(0.1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_singular_names_layer_rank_and_remedy(self, dtype: torch.dtype) -> None:
        hessian = second_moment(layer()[1][:10]).to(dtype)
        with pytest.raises(
            SingularHessianError, match=r"layer nine: .*rank 10 .* 48 .*tried: 0\).*more"
        ) as caught:
            inverse_factor(hessian, 0.0, "layer nine")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("seed", range(20))
    def test_one_repeated_column_in_float32_is_singular(self, seed: int) -> None:
        """A pivot that is only rounding noise, of either sign, is never taken for data."""
        inputs = layer(seed=seed)[1].float()
        inputs[:, 30] = inputs[:, 4]
        with pytest.raises(SingularHessianError, match="rank 47"):
            inverse_factor(inputs.T @ inputs / len(inputs), 0.0, "layer")

    def test_indefinite_beyond_repair_raises_after_all_dampings(self) -> None:
        hessian = torch.eye(4)
        hessian[0, 1] = hessian[1, 0] = 9.0
        with pytest.raises(SingularHessianError, match=r"tried: 0\.01, 0.1, 1"):
            inverse_factor(hessian, 0.01, "layer")

    def test_non_finite_hessian_is_refused(self) -> None:
        with pytest.raises(NonFiniteError, match="layer: the Hessian"):
            inverse_factor(torch.full((4, 4), float("nan")), 0.01, "layer")

    def test_input_that_is_always_zero_prunes_everything_to_zero(self) -> None:
        solution = run(
            SPARSEGPT, torch.ones(2, 8), torch.zeros(8, 8), Pattern.parse("2:4"), PruneParams()
        )
        assert solution.num_dead_columns == 8 and not solution.weight_OI.any()
        assert solution.keep_mask_OI.sum() == 8
