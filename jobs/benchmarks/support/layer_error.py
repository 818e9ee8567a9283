"""The common judge of pruned checkpoints: each layer's error on the dense model's inputs.

Reads files only, whoever wrote them. The inputs are those of the dense model, so that no side is
measured on its own. Shape suffixes: O output features, I input features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparsify.calibration.layers import prunable_linears
from sparsify.data.rows import TokenRows
from sparsify.masks.select import find_violation
from sparsify.models.calls import run_model
from sparsify.models.load import load_model
from sparsify.pattern import Pattern


def dense_hessians(
    model: Any, names: list[str], rows: TokenRows, batch_size: int
) -> dict[str, Tensor]:
    """float64 mean x x^T of the inputs of the linears `names`; layers that share one share it.

    Cost: one forward, and I^2 numbers per distinct input in memory.
    """
    sums: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    seen: dict[int, tuple[str, Tensor]] = {}

    def watch(name: str, inputs: Tensor) -> None:
        # Layers that share an input are given the same tensor. The entry keeps the tensor alive,
        # so that another one cannot get its id before the batch is over.
        first, _ = seen.setdefault(id(inputs), (name, inputs))
        owner[name] = first
        if first == name:
            inputs_TI = inputs.reshape(-1, inputs.shape[-1]).float()
            product = (inputs_TI.T @ inputs_TI).double()
            sums[name] = sums[name] + product if name in sums else product

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: watch(name, args[0])
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in rows.split(batch_size):
            run_model(model, batch, logits_to_keep=1)
            seen.clear()
    for handle in handles:
        handle.remove()
    means = {name: total / rows.num_tokens for name, total in sums.items()}
    return {name: means[owner[name]] for name in names}


def relative_error(dense_OI: Tensor, pruned_OI: Tensor, hessian_II: Tensor) -> float:
    """tr((W - Z) H (W - Z)^T) / tr(W H W^T), in the precision of the Hessian."""
    dense_OI = dense_OI.to(hessian_II.dtype)
    change_OI = dense_OI - pruned_OI.to(hessian_II.dtype)
    error = float(((change_OI @ hessian_II) * change_OI).sum())
    total = float(((dense_OI @ hessian_II) * dense_OI).sum())
    return error / total if total > 0 else 0.0


def judge(
    dense: Path, pruned: dict[str, Path], rows: TokenRows, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Errors, violations and agreement of pruned copies of one dense model.

    Args:
        dense: model folder.
        pruned: name of a side -> its model folder.
        rows: calibration rows for the common Hessians.
        batch_size: rows per forward.

    Returns:
        Per side: `layers` (name -> relative error), `mean_relative_error`,
        `num_violations` (groups of four with more than two nonzeros) and `sparsity`.
    """
    pattern = Pattern.parse("2:4")
    model: Any = load_model(dense)
    names = [name for _, name, _ in prunable_linears(model)]
    hessians = dense_hessians(model, names, rows, batch_size)
    found: dict[str, dict[str, Any]] = {}
    for side, folder in pruned.items():
        errors, num_violations, num_zeros, num_weights = {}, 0, 0, 0
        tensors = _weights(folder, names)
        for name in names:
            dense_OI = model.get_submodule(name).weight.detach()
            pruned_OI = tensors[name]
            errors[name] = relative_error(dense_OI, pruned_OI, hessians[name])
            if find_violation(pruned_OI, pattern) is not None:
                num_violations += _num_violations(pruned_OI)
            num_zeros += int((pruned_OI == 0).sum())
            num_weights += pruned_OI.numel()
        found[side] = {
            "layers": errors,
            "mean_relative_error": sum(errors.values()) / len(errors),
            "num_violations": num_violations,
            "sparsity": num_zeros / num_weights,
        }
    return found


def mask_agreement(first: Path, second: Path, names: list[str]) -> float:
    """Share of 2:4 groups in which two checkpoints keep the same weights."""
    ours, theirs = _weights(first, names), _weights(second, names)
    same = total = 0
    for name in names:
        equal_OI = (ours[name] != 0) == (theirs[name] != 0)
        groups = equal_OI.reshape(-1, 4).all(1)
        same, total = same + int(groups.sum()), total + len(groups)
    return same / total


def _num_violations(weight_OI: Tensor) -> int:
    return int(((weight_OI != 0).reshape(-1, 4).sum(1) > 2).sum())


def _weights(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """The weights of the layers `names` from a folder's safetensors."""
    wanted = {f"{name}.weight": name for name in names}
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in wanted.keys() & file.keys():
                found[wanted[key]] = file.get_tensor(key)
    missing = [name for name in names if name not in found]
    if missing:
        raise KeyError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}")
    return found
