"""What a one-shot method is: parameters and moments in, pruned weight and keep mask out.

A stack is several layers of one shape in one problem: all tensors have a leading dimension, also
those of its moments. Shape suffixes: O output features (rows), I input features (columns), E layers
of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsify.calibration.hessian import InverseFactor
from sparsify.calibration.moments import InputMoments
from sparsify.errors import InputError, NonFiniteError
from sparsify.masks.select import find_violation, keep_mask_from_scores
from sparsify.params import PruneParams
from sparsify.pattern import Pattern, check_divides


@dataclass(frozen=True)
class Problem:
    """A layer (or some rows of it) to prune, or a stack, and all that a method may look at."""

    name: str
    """layer, for messages"""
    weight_OI: Tensor
    """dense weight, any float dtype"""
    moments: InputMoments | None = None
    """moments of the layer's input; None for methods that look at the weight alone"""
    wanted_OI: Tensor | None = None
    """float32 mean of (a W y + b (r_dense - r)) x^T, the part of these rows: y is the layer's input
    in the dense model, r the residual stream that its output is added to, a and b are
    teacher_share and residual_share; None where it is added to none, or for methods without a
    teacher"""
    allowed_OI: Tensor | None = None
    """bool, False = must stay zero; None = no such restriction"""
    is_mask_fixed: bool = False
    """True: the mask is `allowed_OI` itself, and only the kept weights are to be found"""

    @property
    def hessian_II(self) -> Tensor:
        """The Hessian, for methods that need one."""
        assert self.moments is not None, f"{self.name}: this method needs calibration"
        return self.moments.hessian_II

    def factor(self, damping: float) -> InverseFactor:
        """The factor of the damped inverse, see `InputMoments.factor`."""
        assert self.moments is not None, f"{self.name}: this method needs calibration"
        return self.moments.factor(damping, self.name)


@dataclass
class Solution:
    """A pruned layer (or some rows of it), or a stack."""

    weight_OI: Tensor
    """dtype of the given weight; exactly 0.0 wherever the mask is False"""
    keep_mask_OI: Tensor
    """bool, True = survives; the authority, because a kept weight may be 0.0 too"""
    damping: float | None
    """damping that was used; None when the method uses none"""
    num_dead_columns: int | Tensor
    """input columns that were zero on every calibration token, as far as the method looks; a tensor
    (E,) has those of each layer of a stack"""


Solve = Callable[[Problem, Pattern, PruneParams], Solution]
"""Rows are independent of each other, so that processes can share them."""


@dataclass(frozen=True)
class Method:
    """A one-shot pruning method: what a module of this package exports as METHOD."""

    name: str
    summary: str
    """one line for help and reports"""
    needs_hessian: bool
    """False: `solve` works without moments"""
    solve: Solve
    needs_factor: bool = False
    """True: `solve` reads `moments.factor(params.damping)`, which is then computed once"""
    needs_teacher: bool = False
    """True: `solve` reads `wanted_OI`, or `cross_II` where there is none, for which the dense model
    runs beside"""
    order: Literal["layer", "block"] = "block"
    """how its inputs are measured unless asked otherwise, see `layers.SolverNeeds`"""
    takes_stacks: bool = False
    """True: `solve` takes a stack too, with one factor's damping for all of it, in the launches of
    one layer; False: experts are solved one by one"""


def check_problem(problem: Problem, pattern: Pattern) -> None:
    """Refuse a problem whose parts do not fit together.

    Raises:
        InputError: m does not divide the columns; the given mask has another shape, or is fixed
            and keeps more weights than the pattern allows. The message names the layer.
    """
    shape = tuple(problem.weight_OI.shape)
    check_divides(problem.name, shape[-1], pattern)
    if problem.moments is not None:
        expected = (*shape[:-2], shape[-1], shape[-1])
        assert problem.moments.hessian_II.shape == expected, problem.name
    if problem.wanted_OI is not None:
        assert problem.wanted_OI.shape == shape, problem.name
    if problem.allowed_OI is None:
        assert not problem.is_mask_fixed, f"{problem.name}: a fixed mask that is not given"
        return
    if problem.allowed_OI.shape != shape or problem.allowed_OI.dtype != torch.bool:
        raise InputError(
            f"{problem.name}: the given mask is {problem.allowed_OI.dtype} of shape "
            f"{tuple(problem.allowed_OI.shape)}; expected bool of the weight's shape {shape}"
        )
    if not problem.is_mask_fixed:
        return
    masks = [problem.allowed_OI] if len(shape) == 2 else problem.allowed_OI.unbind()
    place = next(filter(None, (find_violation(mask, pattern) for mask in masks)), None)
    if place is not None:
        raise InputError(
            f"{problem.name}: the given mask breaks pattern {pattern} in row {place[0]}, at "
            f"column {place[1]}; give a mask that was made for this pattern"
        )


def chosen_mask(scores_OI: Tensor, problem: Problem, pattern: Pattern) -> Tensor:
    """The highest scores of every group or row among the allowed; the given mask if it is fixed.

    A group with fewer allowed weights than the pattern keeps keeps those alone.
    """
    allowed_OI = problem.allowed_OI
    if allowed_OI is None:
        return keep_mask_from_scores(scores_OI, pattern)
    if problem.is_mask_fixed:
        return allowed_OI.clone()
    scores_OI = scores_OI.masked_fill(~allowed_OI, -math.inf)
    return keep_mask_from_scores(scores_OI, pattern) & allowed_OI


def working_weight(weight_OI: Tensor, name: str) -> Tensor:
    """A copy of the weight in the precision that methods compute in: float32, float64 if given.

    Raises:
        NonFiniteError: the weight holds NaN or infinity; the message names the layer.
    """
    if not bool(torch.isfinite(weight_OI).all()):
        raise NonFiniteError(f"{name}: the weight holds NaN or infinity; check the checkpoint")
    return weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32), copy=True)


def selected(weight_OI: Tensor, keep_mask_OI: Tensor) -> Solution:
    """The solution of a method that only chooses: kept weights stay as they are."""
    pruned = weight_OI.detach().masked_fill(~keep_mask_OI, 0.0)
    return Solution(pruned, keep_mask_OI, damping=None, num_dead_columns=0)
