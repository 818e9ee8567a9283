"""The laws of every method, and how far each one is from the best of all masks on small layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from sparsify.calibration.moments import InputMoments, factor_all, stacked
from sparsify.errors import InputError, NonFiniteError
from sparsify.masks.select import keep_mask_from_scores
from sparsify.methods import (
    Method,
    Problem,
    PruneParams,
    Solution,
    available_methods,
    get_method,
)
from sparsify.methods._base import chosen_mask
from sparsify.methods._refit import damped_hessian, objective
from sparsify.methods._target import teacher_target
from sparsify.methods.admm import column_scales, search
from sparsify.methods.group_descent import descend
from sparsify.pattern import Pattern
from tests.conftest import count_violations

METHODS = list(available_methods().values())
PATTERNS = ["2:4", "4:8", "1:2", "1:4", "unstructured:0.5", "unstructured:0.3"]
TWO_FOUR = Pattern.parse("2:4")
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def make_problem(
    num_rows: int = 12,
    num_columns: int = 48,
    seed: int = 0,
    dead: tuple[int, ...] = (),
    num_tokens: int | None = None,
) -> Problem:
    """A float64 layer that writes to the residual stream, with strongly correlated inputs x, dense
    inputs y near x, and a residual."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, mix = normal(num_rows, num_columns), normal(num_columns, num_columns)
    count = num_tokens or 6 * num_columns
    x = normal(count, num_columns) @ (mix / num_columns**0.5 + torch.eye(num_columns).double())
    y = x + 0.2 * normal(count, num_columns)
    gap = 0.2 * normal(count, num_rows)
    x[:, list(dead)] = 0.0
    moments = InputMoments(x.T @ x / count, 20 * num_columns)
    return Problem("layer", weight, moments, (y @ weight.T + gap).T @ x / count)


def statistics_of(problem: Problem) -> InputMoments:
    assert problem.moments is not None
    return problem.moments


def with_hessian(problem: Problem, hessian: Tensor) -> Problem:
    """The problem without a teacher's gap on another Hessian."""
    return replace(problem, moments=InputMoments(hessian, 960, hessian), wanted_OI=None)


def rows_of(problem: Problem, rows: slice) -> Problem:
    assert problem.wanted_OI is not None
    return replace(problem, weight_OI=problem.weight_OI[rows], wanted_OI=problem.wanted_OI[rows])


def stack_of(problems: list[Problem]) -> Problem:
    """Problems of one shape as one, their factors computed together."""
    moments = [statistics_of(problem) for problem in problems]
    factor_all(moments, PruneParams().damping, [problem.name for problem in problems])

    def together(found: list[Tensor | None]) -> Tensor | None:
        given = [one for one in found if one is not None]
        return torch.stack(given) if given else None

    return replace(
        problems[0], weight_OI=torch.stack([problem.weight_OI for problem in problems]),
        moments=stacked(moments),
        wanted_OI=together([problem.wanted_OI for problem in problems]),
        allowed_OI=together([problem.allowed_OI for problem in problems]),
    )  # fmt: skip


def with_patterns(*texts: str) -> pytest.MarkDecorator:
    """Every method with every pattern, but for those that `test_descent_refuses` is about."""
    pairs = [
        pytest.param(method, text, id=f"{method.name}-{text}")
        for method, text in product(METHODS, texts)
        if method.name != "group_descent" or Pattern.parse(text).is_structured
    ]
    return pytest.mark.parametrize(("method", "text"), pairs)


def same(found: Tensor, expected: Tensor) -> None:
    """Equal in float64 but for the order of summation; measured 6.4e-12 at worst."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


class TestLaws:
    """What holds for every method of the folder, also for one added tomorrow."""

    @with_patterns(*PATTERNS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_exact_count_and_exact_zeros(
        self, method: Method, text: str, dtype: torch.dtype
    ) -> None:
        pattern, problem = Pattern.parse(text), make_problem(dead=(3, 40))
        given = problem.weight_OI.to(dtype)
        problem = replace(problem, weight_OI=given.clone())
        solution = method.solve(problem, pattern, PruneParams(block_size=24))
        width = pattern.m or 48
        kept = solution.keep_mask_OI.reshape(12, -1, width).sum(-1)
        assert (kept == pattern.num_kept(width)).all()
        assert solution.weight_OI.dtype == dtype and solution.keep_mask_OI.dtype == torch.bool
        assert not solution.weight_OI[~solution.keep_mask_OI].any()
        assert torch.isfinite(solution.weight_OI).all()
        assert count_violations(solution.weight_OI, pattern) == 0
        assert torch.equal(problem.weight_OI, given), "the given weight was changed"
        if method.needs_hessian:
            assert solution.num_dead_columns == 2
            assert not solution.keep_mask_OI[:, [3, 40]].any() or not pattern.is_structured
        if method.name not in ("magnitude", "wanda"):
            assert not solution.weight_OI[:, [3, 40]].any()

    @with_patterns("2:4", "4:8", "1:4", "unstructured:0.5")
    @pytest.mark.parametrize("masked", ["free", "allowed", "fixed"])
    def test_a_stack_is_its_layers(self, method: Method, text: str, masked: str) -> None:
        """To the bit on a CPU in float32; with dead columns but for the damping's last bit.

        With fewer rows torch takes another product for a stack of so small matrices.
        """
        if not method.takes_stacks:
            return
        pattern, params, problems = Pattern.parse(text), PruneParams(block_size=16), []
        for seed in range(3):
            given = make_problem(32, seed=seed, dead=(3, 40) if seed == 1 else ())
            assert given.wanted_OI is not None
            allowed = None
            if masked != "free":
                allowed = method.solve(given, pattern, params).keep_mask_OI
                allowed[:, seed] = False
            problems.append(
                replace(
                    given, weight_OI=given.weight_OI.float(), wanted_OI=given.wanted_OI.float(),
                    moments=InputMoments(given.hessian_II.float(), 960), allowed_OI=allowed,
                    is_mask_fixed=masked == "fixed",
                )
            )  # fmt: skip
        found = method.solve(stack_of(problems), pattern, params)
        num_dead = torch.as_tensor(found.num_dead_columns).expand(3)
        for index, problem in enumerate(problems):
            alone = method.solve(
                replace(problem, moments=InputMoments(problem.hessian_II, 960)), pattern, params
            )
            assert torch.equal(found.keep_mask_OI[index], alone.keep_mask_OI)
            assert index == 1 or torch.equal(found.weight_OI[index], alone.weight_OI)
            torch.testing.assert_close(found.weight_OI[index], alone.weight_OI, rtol=0, atol=1e-5)
            assert found.damping == alone.damping
            assert int(num_dead[index]) == int(alone.num_dead_columns)

    @pytest.mark.parametrize("is_wanted", [True, False])
    def test_a_stack_has_the_targets_of_its_layers(self, is_wanted: bool) -> None:
        """Each trusts its target by its own tokens; float64, measured equal."""
        problems = []
        for seed in range(3):
            given = make_problem(seed=seed, dead=(seed,))
            cross = None if is_wanted else 1.1 * given.hessian_II
            moments = InputMoments(given.hessian_II, 300 * (seed + 1), cross)
            wanted = given.wanted_OI if is_wanted else None
            problems.append(replace(given, moments=moments, wanted_OI=wanted))
        found = teacher_target(stack_of(problems), PruneParams())
        for target, problem in zip(found, problems, strict=True):
            same(target, teacher_target(problem, PruneParams()))

    @with_patterns("2:4", "unstructured:0.5")
    def test_rows_are_independent(self, method: Method, text: str) -> None:
        pattern, problem, params = Pattern.parse(text), make_problem(), PruneParams()
        whole = method.solve(problem, pattern, params)
        for rows in (slice(0, 1), slice(1, 7), slice(7, 7), slice(7, 12)):
            part = method.solve(rows_of(problem, rows), pattern, params)
            assert torch.equal(part.keep_mask_OI, whole.keep_mask_OI[rows])
            same(part.weight_OI, whole.weight_OI[rows])

    @with_patterns("2:4", "4:8")
    def test_block_size_does_not_matter(self, method: Method, text: str) -> None:
        pattern, problem = Pattern.parse(text), make_problem()
        whole = method.solve(problem, pattern, PruneParams(block_size=48))
        for block_size in (8, 16, 40, 512):
            other = method.solve(problem, pattern, PruneParams(block_size=block_size))
            assert torch.equal(other.keep_mask_OI, whole.keep_mask_OI)
            same(other.weight_OI, whole.weight_OI)

    @every_method
    def test_scale_of_the_input_does_not_matter(self, method: Method) -> None:
        problem = make_problem(dead=(5,))
        one = method.solve(problem, TWO_FOUR, PruneParams())
        known = statistics_of(problem)
        assert problem.wanted_OI is not None
        scaled = InputMoments(known.hessian_II * 2.0**-30, known.num_tokens)
        other = replace(problem, moments=scaled, wanted_OI=problem.wanted_OI * 2.0**-30)
        found = method.solve(other, TWO_FOUR, PruneParams())
        assert torch.equal(one.keep_mask_OI, found.keep_mask_OI)
        same(found.weight_OI, one.weight_OI)

    @with_patterns(*PATTERNS)
    def test_identity_hessian_gives_magnitude(self, method: Method, text: str) -> None:
        pattern, problem = Pattern.parse(text), make_problem()
        # One quota for the row, as magnitude has it.
        params = PruneParams(block_size=128 if pattern.is_structured else 48)
        problem = with_hessian(problem, torch.eye(48, dtype=torch.float64))
        expected = get_method("magnitude").solve(problem, pattern, params)
        solution = method.solve(problem, pattern, params)
        assert torch.equal(solution.keep_mask_OI, expected.keep_mask_OI)
        same(solution.weight_OI, expected.weight_OI)

    @every_method
    def test_non_finite_weight_names_the_layer(self, method: Method) -> None:
        problem = replace(make_problem(), name="layer seven")
        problem.weight_OI[2, 7] = float("inf")
        with pytest.raises(NonFiniteError, match="layer seven: the weight"):
            method.solve(problem, TWO_FOUR, PruneParams())

    @every_method
    def test_columns_must_be_whole_groups(self, method: Method) -> None:
        with pytest.raises(InputError, match=r"layer: 48 input columns cannot be cut.*of 5"):
            method.solve(make_problem(), Pattern.parse("2:5"), PruneParams())


class TestGivenMasks:
    @with_patterns("2:4", "4:8", "unstructured:0.5")
    def test_what_is_not_allowed_is_never_kept(self, method: Method, text: str) -> None:
        pattern, problem = Pattern.parse(text), make_problem()
        allowed = torch.rand(12, 48, generator=torch.Generator().manual_seed(1)) < 0.7
        solution = method.solve(replace(problem, allowed_OI=allowed), pattern, PruneParams())
        assert not solution.keep_mask_OI[~allowed].any()
        assert not solution.weight_OI[~allowed].any()
        width = pattern.m or 48
        kept, room = (
            mask.reshape(12, -1, width).sum(-1) for mask in (solution.keep_mask_OI, allowed)
        )
        assert torch.equal(kept, room.clamp(max=pattern.num_kept(width)))

    @every_method
    def test_everything_allowed_is_no_restriction(self, method: Method) -> None:
        problem = make_problem()
        allowed = torch.ones(12, 48, dtype=torch.bool)
        free = method.solve(problem, TWO_FOUR, PruneParams())
        found = method.solve(replace(problem, allowed_OI=allowed), TWO_FOUR, PruneParams())
        assert torch.equal(found.keep_mask_OI, free.keep_mask_OI)
        same(found.weight_OI, free.weight_OI)

    @with_patterns("2:4", "16:32", "unstructured:0.5")
    def test_a_fixed_mask_is_the_mask(self, method: Method, text: str) -> None:
        pattern, problem = Pattern.parse(text), make_problem(num_columns=64)
        mask = keep_mask_from_scores(make_problem(num_columns=64, seed=1).weight_OI, pattern)
        fixed = replace(problem, allowed_OI=mask, is_mask_fixed=True)
        solution = method.solve(fixed, pattern, PruneParams(refit_iterations=60))
        assert torch.equal(solution.keep_mask_OI, mask)
        assert not solution.weight_OI[~mask].any()
        target = teacher_target(problem, PruneParams()) if method.needs_teacher else None
        if method.name in ("magnitude", "wanda"):
            assert torch.equal(solution.weight_OI, problem.weight_OI * mask)
        elif method.name != "sparsegpt":
            # Those that refit find the least squares on the mask, wherever they start.
            goal = problem.weight_OI if target is None else target
            same(solution.weight_OI, least_squares(goal, mask, damped_of(problem)))

    @every_method
    def test_a_fixed_mask_must_have_the_pattern(self, method: Method) -> None:
        problem = replace(make_problem(), name="layer nine", is_mask_fixed=True)
        mask = keep_mask_from_scores(problem.weight_OI, TWO_FOUR)
        mask[3, 8:11] = True
        with pytest.raises(
            InputError, match=r"layer nine: .*breaks pattern 2:4 in row 3.*column 8"
        ):
            method.solve(replace(problem, allowed_OI=mask), TWO_FOUR, PruneParams())
        with pytest.raises(InputError, match=r"layer nine: .*\(12, 40\).*\(12, 48\)"):
            method.solve(replace(problem, allowed_OI=mask[:, :40]), TWO_FOUR, PruneParams())


def damped_of(problem: Problem) -> Tensor:
    return damped_hessian(problem.hessian_II, 0.01, torch.float64)


def least_squares(target: Tensor, mask: Tensor, damped: Tensor) -> Tensor:
    """Normal equations of every row on its own mask."""
    result = torch.zeros_like(target)
    for row, keep in enumerate(mask):
        right = damped[keep] @ target[row]
        result[row, keep] = torch.linalg.solve(damped[keep][:, keep], right)
    return result


def best_of_all_masks(target: Tensor, damped: Tensor) -> Tensor:
    """(O,) lowest error of every row over all 2:4 masks, each with its normal equations."""
    num_groups = target.shape[1] // 4
    pairs = list(combinations(range(4), 2))
    columns = torch.tensor(
        [[4 * group + i for group, pair in enumerate(choice) for i in pair]
         for choice in product(pairs, repeat=num_groups)]
    )  # fmt: skip
    right = target @ damped
    total = ((target @ damped) * target).sum(1)
    part = damped[columns.unsqueeze(2), columns.unsqueeze(1)]  # (masks, kept, kept)
    wanted = right[:, columns].permute(1, 2, 0)  # (masks, kept, rows)
    removed = (torch.linalg.solve(part, wanted) * wanted).sum(1)
    return total - removed.max(0).values


# Errors in units of the optimum, measured with this seed; the bounds leave 2 % for rounding.
MEASURED = {
    8: {"magnitude": 3.80, "wanda": 3.37, "sparsegpt": 2.52, "sparsegpt_refit": 1.88,
        "sparsegpt_teacher": 1.86, "group_descent": 1.18, "twofour": 1.33, "admm": 1.32},
    12: {"magnitude": 2.36, "wanda": 2.27, "sparsegpt": 1.80, "sparsegpt_refit": 1.40,
         "sparsegpt_teacher": 1.41, "group_descent": 1.17, "twofour": 1.16, "admm": 1.15},
}  # fmt: skip


@pytest.mark.parametrize(("num_columns", "num_rows"), [(8, 200), (12, 200)])
def test_distance_to_the_best_of_all_masks(num_columns: int, num_rows: int) -> None:
    """6^2 and 6^3 masks per row; errors are towards what each method aims at."""
    problem = make_problem(num_rows, num_columns, seed=5, num_tokens=400)
    damped, params = damped_of(problem), PruneParams(refit_iterations=40)
    ratios = {}
    for method in METHODS:
        goal = teacher_target(problem, params) if method.needs_teacher else problem.weight_OI
        found = objective(method.solve(problem, TWO_FOUR, params).weight_OI, goal, damped)
        best = best_of_all_masks(goal, damped)
        assert (found >= best - 1e-9).all(), method.name
        ratios[method.name] = float(found.sum() / best.sum())
    assert set(MEASURED[num_columns]) == set(ratios), ratios
    for name, measured in MEASURED[num_columns].items():
        assert ratios[name] < 1.02 * measured, (name, ratios)
    for better, worse in [
        ("wanda", "magnitude"), ("sparsegpt", "wanda"), ("sparsegpt_refit", "sparsegpt"),
        ("group_descent", "sparsegpt_refit"), ("admm", "sparsegpt_refit"),
        ("twofour", "sparsegpt_teacher"),
    ]:  # fmt: skip
        assert ratios[better] < ratios[worse], (better, worse, ratios)


class TestDescent:
    def start(self, problem: Problem) -> tuple[Tensor, Tensor]:
        keep = keep_mask_from_scores(problem.weight_OI.abs(), TWO_FOUR)
        return problem.weight_OI * keep, keep

    def test_every_sweep_lowers_every_row(self) -> None:
        problem = make_problem(num_rows=40)
        damped, target = damped_of(problem), problem.weight_OI
        weight, keep = self.start(problem)
        errors = [objective(weight, target, damped)]
        for _ in range(6):
            keep = descend(weight, keep, target, damped, TWO_FOUR, 1, 16)
            assert not weight[~keep].any()
            assert count_violations(keep, TWO_FOUR) == 0
            errors.append(objective(weight, target, damped))
            assert (errors[-1] <= errors[-2] * (1 + 1e-12)).all()
        assert (errors[1] < errors[0]).all()

    def test_one_group_is_solved_exactly_from_anywhere(self) -> None:
        problem = make_problem(50, 4, num_tokens=100)
        damped, target = damped_of(problem), problem.weight_OI
        weight = torch.randn(50, 4, generator=torch.Generator().manual_seed(3)).double()
        keep = keep_mask_from_scores(weight, TWO_FOUR)
        weight *= keep
        descend(weight, keep, target, damped, TWO_FOUR, 1, 4)
        # Measured 1.5e-12 relative.
        torch.testing.assert_close(
            objective(weight, target, damped), best_of_all_masks(target, damped),
            rtol=1e-10, atol=1e-12,
        )  # fmt: skip

    @pytest.mark.parametrize("text", ["2:4", "1:2", "4:8"])
    def test_at_the_end_no_group_can_do_better(self, text: str) -> None:
        pattern, problem = Pattern.parse(text), make_problem(num_rows=4)
        damped, target = damped_of(problem), problem.weight_OI
        keep = keep_mask_from_scores(target.abs(), pattern)
        weight = target * keep
        keep = descend(weight, keep, target, damped, pattern, 100, 48)
        error = objective(weight, target, damped)
        for left in range(0, 48, pattern.m):
            for kept in combinations(range(left, left + pattern.m), pattern.n):
                other = weight.clone()
                other[:, left : left + pattern.m] = 0.0
                right = ((target - other) @ damped)[:, list(kept)]
                part = damped[list(kept)][:, list(kept)]
                other[:, list(kept)] = torch.linalg.solve(part, right.T).T
                assert (objective(other, target, damped) >= error - 1e-9).all()

    def test_no_sweeps_change_nothing(self) -> None:
        problem = make_problem()
        weight, keep = self.start(problem)
        before = weight.clone()
        after = descend(weight, keep, problem.weight_OI, damped_of(problem), TWO_FOUR, 0, 16)
        assert torch.equal(weight, before) and torch.equal(after, keep)

    @pytest.mark.parametrize("text", ["unstructured:0.5", "8:16"])
    def test_descent_refuses_what_it_cannot_go_through(self, text: str) -> None:
        with pytest.raises(InputError, match=rf"layer: .*{text}.*prune.method=sparsegpt_refit"):
            get_method("group_descent").solve(make_problem(), Pattern.parse(text), PruneParams())


class TestAdmm:
    def test_without_iterations_the_mask_is_that_of_wanda(self) -> None:
        problem = make_problem()
        found = get_method("admm").solve(problem, TWO_FOUR, PruneParams(admm_iterations=0))
        wanda = get_method("wanda").solve(problem, TWO_FOUR, PruneParams())
        assert torch.equal(found.keep_mask_OI, wanda.keep_mask_OI)

    def test_the_two_copies_agree_in_the_end(self) -> None:
        """With the penalty grown, the values found with the mask are already near least squares."""
        problem = make_problem(num_rows=40)
        damped, target = damped_of(problem), problem.weight_OI
        start = chosen_mask(target.abs() * column_scales(damped), problem, TWO_FOUR)
        params = PruneParams(admm_iterations=120)
        weight, keep = search(target, damped, problem, TWO_FOUR, params, start)
        best = objective(least_squares(target, keep, damped), target, damped).sum()
        # Measured 1.0003.
        assert objective(weight, target, damped).sum() < 1.01 * best

    def test_more_iterations_are_worth_it(self) -> None:
        problem = make_problem(num_rows=40)
        damped, target = damped_of(problem), problem.weight_OI

        def error(iterations: int) -> float:
            params = PruneParams(admm_iterations=iterations)
            weight = get_method("admm").solve(problem, TWO_FOUR, params).weight_OI
            return float(objective(weight, target, damped).sum())

        # Measured 0.56.
        assert error(30) < 0.65 * error(0)

    @pytest.mark.parametrize("method", ["admm", "twofour"])
    def test_half_precision_finds_a_mask_as_good(self, method: str) -> None:
        """The search alone is in half: kept weights are refitted in full to the same rounding."""
        problem = make_problem(num_rows=200)
        damped, target = damped_of(problem), problem.weight_OI

        def found(precision: str) -> Solution:
            params = PruneParams(search_precision=precision)
            return get_method(method).solve(problem, TWO_FOUR, params)

        full, half = found("float32"), found("half")
        assert torch.equal(found("auto").weight_OI, full.weight_OI), "no GPU here"
        differ = (half.keep_mask_OI != full.keep_mask_OI).double().mean()
        assert differ < 0.01, "near ties alone"
        assert not torch.equal(half.weight_OI, full.weight_OI), "it would be full precision"
        errors = [float(objective(s.weight_OI, target, damped).sum()) for s in (full, half)]
        assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_a_teacher_brings_the_output_closer_to_the_dense_output() -> None:
    """On the tokens themselves: mean || Z x - W y ||^2 without a residual."""
    generator = torch.Generator().manual_seed(0)
    weight, mix = (torch.randn(*s, generator=generator).double() for s in ((16, 32), (32, 32)))
    y = torch.randn(4000, 32, generator=generator).double() @ (mix / 6 + torch.eye(32).double())
    x = y @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)).double()
    moments = InputMoments(x.T @ x / 4000, 4000, y.T @ x / 4000)
    problem = Problem("layer", weight, moments)

    def error(name: str) -> float:
        params = PruneParams(teacher_share=1.0)
        pruned = get_method(name).solve(problem, TWO_FOUR, params).weight_OI
        return float((x @ pruned.T - y @ weight.T).square().sum())

    # Measured 0.24 and 0.19.
    assert error("sparsegpt_teacher") < 0.3 * error("sparsegpt_refit")
    assert error("twofour") < 0.25 * error("admm")


def test_unknown_method_lists_the_known_ones() -> None:
    known = r"prune\.method=obs: unknown.*magnitude, .*sparsegpt, .*wanda"
    with pytest.raises(InputError, match=known):
        get_method("obs")
    with pytest.raises(InputError, match=r"=resolve: .*\(it is now called sparsegpt_refit\)"):
        get_method("resolve")
