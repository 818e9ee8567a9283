"""Where a recovery's loss will end, from its first part: a fitted curve with an interval.

The loss of a run falls about as a power of what it has been trained so far. What it has been
trained is not the number of steps but the learning rates added up, and a falling rate lowers the
loss once more because the weights shake less. Both matter: from the first 30 % of our runs a power
law in tokens alone misses the end by 15 %, this one by 5 %.

The model, with S(t) the sum of the learning rates up to step t over the largest one, and
r(t) the rate of step t over the largest one:

    L(t) = (a + b (S(t) + s)^-c) (1 + g r(t)),    a, b, c, s, g >= 0

It is the law L(t) = a + b (t + t0)^-c at a constant rate. The annealing gain g is our deviation
from it, in the spirit of Tissue et al. 2024 (arXiv 2408.11029), who subtract a term that grows
while the rate falls: multiplied here, since the noise of a KL is in proportion to it. The first
part of a run cannot show g, as its rate has hardly fallen; g is taken to be anything between 0 and
0.25 alike, the range that fits over 28 whole runs gave (0.02 to 0.25, one 0.55). The floor `a` is
taken only where the points ask for it (BIC), because a floor read off a short curve is too high.

What it was measured on: the training KL of 28 recoveries (models of 0.26 to 1.6 million parameters,
73 and 244 steps, linear decay to 5 %, 10 steps of warm-up), the mean of the last 5 % predicted with
an interval of 80 %:

    seen    in the interval    median error    median width    constant rate: error, in interval
    30 %    23 of 27           4.6 %           19 %            14.5 %, 23 of 28
    50 %    25 of 28           2.3 %           12 %             5.3 %, 20 of 28
    70 %    24 of 28           2.4 %            8 %             5.5 %, 14 of 28

(One run of 50 steps has too few points at 30 %.) On 300 synthetic runs of this very law, half of
them with a floor, all with autocorrelated noise, the interval of 80 % holds 72 to 73 %.

The range of g was chosen on the same runs, all with one schedule: for others it is an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import InputError

MIN_POINTS = 10

_EXPONENTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5, 2.0)

_OFFSETS = (0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4)  # s as shares of S at the end

_MAX_ANNEALING_GAIN = 0.25

_MOST_POINTS = 400  # more are averaged in groups: the fit does not get better, only slower

_NUM_ROBUST_ROUNDS = 4

_OUTLIER = 3.0  # scaled median absolute deviations at which a residual is cut

_NUM_BAND_POINTS = 24

_NUM_RESAMPLES = 200  # of the bootstrap

_SEED = 0  # of the bootstrap


@dataclass(frozen=True)
class Forecast:
    """A predicted end of a loss curve, or the reason why there is none."""

    num_steps: int
    """optimizer steps of the whole run"""
    last_step: int
    """step of the last point that was seen; 0 without points"""
    num_points: int
    """points that the curve was fitted to (after warm-up)"""
    coverage: float
    """share of runs whose end should lie between `low` and `high`"""
    reason: str | None = None
    """why there is no forecast; None if there is one"""
    predicted: float | None = None
    """median of the end's distribution"""
    low: float | None = None
    """lower end of the interval"""
    high: float | None = None
    """upper end of the interval"""
    now: float | None = None
    """the fitted curve at the last point"""
    residual: float | None = None
    """root mean square of the points' relative distance from the curve, outliers cut"""
    band: tuple[tuple[int, float, float, float], ...] = ()
    """(step, low, median, high) of the curve itself, without noise, from now to the end"""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self) | {"band": [list(point) for point in self.band]}


def forecast(
    steps: Sequence[int],
    values: Sequence[float],
    rates: Sequence[float],
    num_final: int = 1,
    coverage: float = 0.8,
) -> Forecast:
    """Predict the mean of the last `num_final` values of a run from its values so far.

    The curve is fitted by least squares on relative residuals, over a grid of (c, s) with (a, b)
    in closed form, in four rounds that cut residuals at 3 scaled median absolute deviations. The
    interval comes from a circular block bootstrap of the residuals (blocks of N^(1/3) points, since
    neighbours are alike), each resample with its own g, and with the noise of
    the last values; the same input gives the same numbers.

    Args:
        steps: steps after which the values were measured, from 1, rising; any spacing.
        values: loss or divergence at them, held-out or of training, > 0.
        rates: learning rate of every step of the run, planned ones included; a constant list
            stands for a constant rate. Its length is the length of the run.
        num_final: values at the end whose mean is predicted: 1 for a held-out loss, a few per cent
            of the steps for a training loss, whose single values are noisy.
        coverage: of the interval, between 0 and 1.

    Returns:
        The forecast; with a `reason` and no numbers when there are fewer than 10 points after the
        warm-up, or the values do not fall.

    Raises:
        InputError: a value that is not positive and finite, steps that do not rise or are outside
            the run, or rates that are no rates.

    Cost: tens of milliseconds; no more than 400 points are fitted.
    """
    _check(steps, values, rates, num_final, coverage)
    rates_T = torch.tensor(rates, dtype=torch.float64)
    share_T = rates_T / rates_T.max()
    warmup = int(share_T.argmax()) + 1  # the curve begins when the rate has reached its peak
    after = [i for i, step in enumerate(steps) if step > warmup]
    num_steps, last_step = len(rates), steps[-1] if len(steps) else 0
    if len(after) < MIN_POINTS:
        reason = f"{len(after)} points after the warm-up, {MIN_POINTS} are needed"
        return Forecast(num_steps, last_step, len(after), coverage, reason)
    at_N = torch.tensor([steps[i] - 1 for i in after])
    value_N = torch.tensor([values[i] for i in after], dtype=torch.float64)
    half = len(after) // 2
    first, last = value_N[:half].median().item(), value_N[-half:].median().item()
    if last >= first:
        reason = (
            f"the values do not fall: {first:.4g} in their first half, {last:.4g} in the second"
        )
        return Forecast(num_steps, last_step, len(after), coverage, reason)
    spacing = max(1, int((at_N[1:] - at_N[:-1]).median()))
    generator = torch.Generator().manual_seed(_SEED)
    group = math.ceil(len(after) / _MOST_POINTS)
    curve = _Curve(share_T, *(_group_means(x, group) for x in (at_N.double(), value_N)))
    fitted, residual_N = curve.fit_robustly()
    sample = curve.resample(fitted, residual_N, _NUM_RESAMPLES, generator)
    end = torch.arange(max(last_step, num_steps - num_final * spacing), num_steps)
    end = end if len(end) else torch.tensor([num_steps - 1])
    ends_R = sample.at(end).mean(dim=1)
    num_noise = max(1, round(num_final / group))
    drawn = torch.randint(len(residual_N), (_NUM_RESAMPLES, num_noise), generator=generator)
    ends_R = ends_R * (1 + residual_N[drawn].mean(dim=1))
    low, middle, high = _quantiles(ends_R[:, None], coverage)
    now = sample.at(torch.tensor([last_step - 1])).median().item()
    return Forecast(
        num_steps, last_step, len(after), coverage, None, middle[0], low[0], high[0], now,
        residual_N.square().mean().sqrt().item(), _band(sample, last_step, num_steps, coverage),
    )  # fmt: skip


def _check(
    steps: Sequence[int], values: Sequence[float], rates: Sequence[float], num_final: int,
    coverage: float,
) -> None:  # fmt: skip
    if len(steps) != len(values):
        raise InputError(f"forecast: {len(steps)} steps but {len(values)} values; one each")
    if not rates or not all(math.isfinite(r) and r >= 0 for r in rates) or not max(rates) > 0:
        raise InputError("forecast: learning rates must be numbers >= 0, one of them above 0")
    if not (0 < coverage < 1 and num_final >= 1):
        raise InputError(
            f"forecast: coverage={coverage} must be in (0, 1), {num_final=} at least 1"
        )
    before = 0
    for step, value in zip(steps, values, strict=True):
        if not before < step <= len(rates):
            raise InputError(
                f"forecast: step {step} after step {before}; steps must rise, from 1 to the "
                f"run's {len(rates)}"
            )
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"forecast: value {value} at step {step}; must be a number > 0")
        before = step


def _group_means(x_N: Tensor, size: int) -> Tensor:
    """Means of `size` neighbours; a short rest at the start joins no group and is left out."""
    return x_N[len(x_N) % size :].unflatten(0, (-1, size)).mean(dim=1)


@dataclass(frozen=True)
class _Fit:
    """R curves; `cell` is the place of (c, s) in the grid. All of shape (R,)."""

    basis_GT: Tensor
    share_T: Tensor
    floor: Tensor
    scale: Tensor
    cell: Tensor
    gain: Tensor

    def at(self, steps_M: Tensor) -> Tensor:
        """Values (R, M) at steps counted from 0."""
        falling_RM = self.basis_GT[:, steps_M][self.cell]
        base_RM = self.floor[:, None] + self.scale[:, None] * falling_RM
        return base_RM * (1 + self.gain[:, None] * self.share_T[steps_M])


class _Curve:
    """The points of one run, and the grid of falling curves to fit them with.

    Letters: N points, T steps of the run, G cells of the grid, R resamples.
    """

    def __init__(self, share_T: Tensor, at_N: Tensor, value_N: Tensor) -> None:
        trained_T = share_T.cumsum(dim=0)
        exponents = torch.tensor(_EXPONENTS, dtype=torch.float64)
        offsets = torch.tensor(_OFFSETS, dtype=torch.float64) * trained_T[-1]
        c_G1, s_G1 = (x.reshape(-1, 1) for x in torch.meshgrid(exponents, offsets, indexing="ij"))
        # Scaled to 1 at the end, so that `scale` is of the size of the values.
        self.basis_GT = ((trained_T + s_G1) / (trained_T[-1] + s_G1)) ** -c_G1
        self.share_T = share_T
        nearest_N = at_N.round().long()
        self.basis_GN = self.basis_GT[:, nearest_N]
        self.share_N = share_T[nearest_N]
        self.value_N = value_N

    def fit_robustly(self) -> tuple[_Fit, Tensor]:
        """The curve through the points at the middle of g, and its relative residuals (N,), cut."""
        gain = torch.tensor([_MAX_ANNEALING_GAIN / 2], dtype=torch.float64)
        flat_N = self.value_N / (1 + gain * self.share_N)
        # The first round must not follow a spike: a value above the median weighs little.
        used_N, size_N = flat_N, flat_N.clamp(min=flat_N.median().item())
        for _ in range(_NUM_ROBUST_ROUNDS):
            fit = self._fit(used_N[None], size_N, gain)
            size_N = fit.floor + fit.scale * self.basis_GN[fit.cell[0]]
            residual_N = flat_N / size_N - 1
            spread = 1.4826 * (residual_N - residual_N.median()).abs().median()
            residual_N = residual_N.clamp(-_OUTLIER * spread, _OUTLIER * spread)
            used_N = size_N * (1 + residual_N)
        return fit, residual_N

    def resample(
        self, fit: _Fit, residual_N: Tensor, num_resamples: int, generator: torch.Generator
    ) -> _Fit:
        """Curves through points made again from the fitted ones and blocks of residuals."""
        num = len(residual_N)
        length = max(1, round(num ** (1 / 3)))
        shape = (num_resamples, math.ceil(num / length))
        start = torch.randint(num, shape, generator=generator)
        place_RN = (start[..., None] + torch.arange(length)).flatten(1)[:, :num] % num
        centred_N = (residual_N - residual_N.mean()) * math.sqrt(num / (num - 3))
        size_N = fit.floor + fit.scale * self.basis_GN[fit.cell[0]]
        curve_N = size_N * (1 + fit.gain * self.share_N)
        gain_R = _MAX_ANNEALING_GAIN * torch.rand(
            num_resamples, dtype=torch.float64, generator=generator
        )
        flat_RN = curve_N * (1 + centred_N[place_RN]) / (1 + gain_R[:, None] * self.share_N)
        return self._fit(flat_RN, size_N, gain_R)

    def _fit(self, flat_RN: Tensor, size_N: Tensor, gain_R: Tensor) -> _Fit:
        """Least squares on (y - f) / size for every row of y; a floor only where BIC asks for it.

        Normal equations of the two columns 1 and p, solved for all cells and rows at once.
        """
        weight_N = size_N**-2
        num = len(size_N)
        w, p = weight_N.sum(), self.basis_GN @ weight_N
        pp = (self.basis_GN.square() @ weight_N)[:, None]
        y = (flat_RN @ weight_N)[None]
        yy = (flat_RN.square() @ weight_N)[None]
        py = self.basis_GN @ (flat_RN * weight_N).T  # (G, R)
        p = p[:, None]
        plain_GR = py / pp
        plain_error_GR = (yy - plain_GR * py).clamp(min=0)
        determinant = w * pp - p.square()
        scale_GR = (w * py - p * y) / determinant
        floor_GR = (y - p * scale_GR) / w
        error_GR = (yy - floor_GR * y - scale_GR * py).clamp(min=0)
        is_curve_GR = (floor_GR >= 0) & (scale_GR >= 0)
        error_GR = error_GR.masked_fill(~is_curve_GR, math.inf)
        best, plain = error_GR.argmin(dim=0), plain_error_GR.argmin(dim=0)
        row = torch.arange(len(flat_RN))
        least, plain_least = error_GR[best, row], plain_error_GR[plain, row]
        # Rounding leaves nothing to compare between two perfect fits.
        tiny = 1e-12 * yy[0]
        gained_R = num * torch.log((plain_least + tiny) / (least + tiny))
        has_floor_R = gained_R > math.log(num)
        return _Fit(
            self.basis_GT,
            self.share_T,
            torch.where(has_floor_R, floor_GR[best, row], 0.0),
            torch.where(has_floor_R, scale_GR[best, row], plain_GR[plain, row]),
            torch.where(has_floor_R, best, plain),
            gain_R,
        )


def _quantiles(values_RM: Tensor, coverage: float) -> tuple[list[float], list[float], list[float]]:
    shares = torch.tensor([(1 - coverage) / 2, 0.5, (1 + coverage) / 2], dtype=torch.float64)
    low, middle, high = values_RM.quantile(shares, dim=0).tolist()
    return low, middle, high


def _band(
    sample: _Fit, last_step: int, num_steps: int, coverage: float
) -> tuple[tuple[int, float, float, float], ...]:
    steps_M = torch.linspace(last_step, num_steps, _NUM_BAND_POINTS).round().long().unique()
    curves = _quantiles(sample.at(steps_M - 1), coverage)
    return tuple(zip(steps_M.tolist(), *curves, strict=True))
