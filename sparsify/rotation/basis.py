"""Rotations of a model's residual stream as data: folded into weights, kept in a file.

A model whose rotations were folded in computes the same function with hidden states in another
basis. Kept beside the model, the rotations bring the one it came from into that basis too, so that
hidden states of the two can be compared. Shape suffixes: D hidden size, O and I rows and columns
of a weight, H key-value heads, Q query heads of one of them, K width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparsify.data.rows import TokenRows
from sparsify.errors import InputError, NonFiniteError
from sparsify.models.calls import logits_of
from sparsify.models.stored import declare_untied
from sparsify.rotation.sites import RotationSites, find_rotation_sites
from sparsify.tensors import write_tensors

_FORMAT = "twofour-rotation-1"  # also the one key of the metadata: several have no fixed order

_NUM_CHECKED = 16  # tokens of the forward that proves a fold


@dataclass(frozen=True)
class Rotation:
    """Orthogonal matrices found for one model; rows are vectors on the left."""

    residual_DD: Tensor
    """R1, float64: hidden states h become h R1"""
    values: list[Tensor]
    """R2, float64 (H, K, K) per attention in the model's order; [] leaves values as they are"""

    def save(self, path: Path) -> None:
        """Write a safetensors file; the same rotation gives the same bytes.

        Cost: 8 (D^2 + layers H K^2) bytes, for an 8B model below 1 % of its weights.
        """
        tensors = {"stream": self.residual_DD.cpu().contiguous()}
        tensors |= {f"values.{i}": v.cpu().contiguous() for i, v in enumerate(self.values)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {_FORMAT: str(len(self.values))})

    @classmethod
    def load(cls, path: Path) -> Rotation:
        """What `save` wrote.

        Raises:
            InputError: it is missing, damaged or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                number = int((file.metadata() or {})[_FORMAT])
                values = [file.get_tensor(f"values.{i}") for i in range(number)]
                return cls(file.get_tensor("stream"), values)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{path}: no rotation of this project ({type(error).__name__}: {error}); copy it "
                "from the model folder that the pruned model came from, or prune again"
            ) from None


@torch.no_grad()
def fold_rotation(model: nn.Module, rotation: Rotation) -> float:
    """Fold the norms' gains and a rotation into the weights of the model it was found for, which is
    in evaluation mode.

    On one device and in one dtype the weights that come out are those of `rotate.rotate_model`
    to the bit.

    Returns:
        The largest |logit - logit before| on a few tokens.

    Raises:
        InputError: the model cannot be rotated, or is not of the rotation's shapes (before anything
            is changed); or its logits came out different.
        NonFiniteError: logits are NaN or infinite.

    Cost: two forwards of a few tokens; 2 D operations per weight in float64, one weight at a time.
    """
    sites = find_rotation_sites(model)
    _check_fits(sites, rotation)
    ids_1T = torch.arange(_NUM_CHECKED)[None] % sites.head.out_features
    check = TokenRows.whole(ids_1T)
    before = logits_of(model, check)
    fold_gains(model, sites)
    turn(sites, rotation)
    return require_same(model, check, before)


def _check_fits(sites: RotationSites, rotation: Rotation) -> None:
    width = sites.embedding.weight.shape[1]
    wanted = [(s.num_kv_heads, s.head_dim, s.head_dim) for s in sites.values]
    found = [tuple(value.shape) for value in rotation.values]
    if tuple(rotation.residual_DD.shape) != (width, width) or found not in ([], wanted):
        raise InputError(
            f"rotation: of a residual stream of width {len(rotation.residual_DD)} and {len(found)} "
            f"attentions, the model has width {width} and {len(wanted)}; rotation and model are "
            "of different runs"
        )


def fold_gains(model: Any, sites: RotationSites) -> None:
    """Fold the norms' gains into the readers; a tied output layer gets a weight of its own.

    The model's config says so too, for the next load.
    """
    if sites.head.weight is sites.embedding.weight:
        trainable = sites.head.weight.requires_grad
        sites.head.weight = nn.Parameter(sites.head.weight.detach().clone(), trainable)
        declare_untied(model)
    for site in sites.norms:
        weight_D: Any = site.norm.weight
        gain_D = weight_D.double() + site.offset
        for linear in site.readers.values():
            linear.weight.copy_(linear.weight.double() * gain_D)
        weight_D.fill_(1.0 - site.offset)


def turn(sites: RotationSites, rotation: Rotation) -> None:
    """Fold a rotation into the weights of a model without gains, in float64."""
    device = sites.head.weight.device
    residual_DD = rotation.residual_DD.to(device)
    values = [value.to(device) for value in rotation.values]
    used = list(zip(sites.values, values, strict=True)) if values else []
    value_of = {id(site.value): value for site, value in used}
    output_of = {id(site.output): value for site, value in used}
    sites.embedding.weight.copy_(sites.embedding.weight.double() @ residual_DD)
    for site in sites.norms:
        for linear in site.readers.values():
            weight_OD = linear.weight.double() @ residual_DD
            value = value_of.get(id(linear))
            if value is not None:
                weight_OD = rotate_rows(weight_OD, value)
                if linear.bias is not None:
                    bias_O1 = linear.bias.double()[:, None]
                    linear.bias.copy_(rotate_rows(bias_O1, value)[:, 0])
            linear.weight.copy_(weight_OD)
    for linear in sites.writers.values():
        weight_DI = residual_DD.T @ linear.weight.double()
        value = output_of.get(id(linear))
        if value is not None:
            weight_DI = rotate_columns(weight_DI, value)
        linear.weight.copy_(weight_DI)
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.double() @ residual_DD)


def rotate_rows(weight_OI: Tensor, rotation_HKK: Tensor) -> Tensor:
    """R2^T on the rows of every key-value head."""
    heads = weight_OI.unflatten(0, rotation_HKK.shape[:2])
    return (rotation_HKK.transpose(1, 2) @ heads).flatten(0, 1)


def rotate_columns(weight_OI: Tensor, rotation_HKK: Tensor) -> Tensor:
    """R2 on the columns of every query head; those of one key-value head follow each other."""
    num_heads, width, _ = rotation_HKK.shape
    heads = weight_OI.unflatten(1, (num_heads, -1, width))
    return torch.einsum("ohqk,hkl->ohql", heads, rotation_HKK).flatten(1)


def require_same(model: nn.Module, rows: TokenRows, before: Tensor) -> float:
    """The largest difference of the logits; InputError when it is more than rounding."""
    after = logits_of(model, rows)
    # RMSNorm of transformers computes in float32, also in a float64 model.
    eps = max(torch.finfo(after.dtype).eps, torch.finfo(torch.float32).eps)
    after, before = after.double(), before.double()
    if not bool(torch.isfinite(after).all()):
        raise NonFiniteError("rotation: logits are not finite; check the weights")
    change = float((after - before).square().mean().sqrt() / before.std())
    # Rounding leaves some eps (measured below 30 of them), a part that did not rotate about 1.
    if change > math.sqrt(eps):
        raise InputError(
            f"rotation: logits of {type(model).__name__} moved by {change:.2g} of their spread, so "
            "something in it does not rotate; leave rotation out for this model"
        )
    return float((after - before).abs().max())
