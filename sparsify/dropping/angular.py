"""The block of layers that turns the residual stream the least, as published.

Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887,
equation 7): d(x_l, x_{l+n}) = 1/pi arccos(x_l . x_{l+n} / (|x_l| |x_{l+n}|)), x_l the input of
layer l at the final token of a row, averaged over rows; layers l* to l*+n-1 go, l* = argmin_l d.

Shape suffixes: X places in the residual stream (L + 1 of a model of L layers), N rows, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.dropping._base import Choice, Rule, Task, Unit
from sparsify.errors import NonFiniteError
from sparsify.models.blocks import Blocks
from sparsify.models.calls import BlockArguments, BlockCalls, first_block_alone, run_block
from sparsify.models.isolation import check_isolation


@torch.no_grad()
def final_tokens(blocks: Blocks, task: Task) -> Tensor:
    """The residual stream at the last token of this process's rows, before each layer and after.

    One pass over the rows, layer after layer, so that of a checkpoint that is read block by block
    only one layer is in memory, beside the hidden states of the process's rows.

    Args:
        blocks: of the model.
        task: with its rows.

    Returns:
        (L + 1, N, D) in the model's dtype, on the CPU: x_l is what layer l gets, and x_L what the
        last layer gives, before the final norm. (`hidden_states[-1]` of transformers is behind it.)
    """
    assert task.rows is not None, "the rule needs rows"
    calls = BlockCalls(blocks.model, blocks.blocks)
    batches = task.rows.split(task.batch_size) if len(task.rows) else []
    held: list[tuple[Tensor, BlockArguments]] = []
    found: list[list[Tensor]] = [[] for _ in range(len(blocks.blocks) + 1)]
    for index in range(len(blocks.blocks)):
        block = blocks.open(index)
        if index == 0 and batches:
            if task.rows.is_joined:
                with first_block_alone(blocks.model):
                    check_isolation(blocks.model)
            calls.learn(block, batches[0][:1])
            held = [calls.all(batch) for batch in batches]
        for at, (hidden_BTD, arguments) in enumerate(held):
            found[index].append(hidden_BTD[:, -1].cpu())
            held[at] = run_block(block, arguments.call(index, hidden_BTD)), arguments
        blocks.close(index)
        task.on_step(index + 1, len(blocks.blocks), "blocks")
    found[-1] = [hidden_BTD[:, -1].cpu() for hidden_BTD, _ in held]
    if not batches:
        return torch.empty(len(found), 0, 1)
    return torch.stack([torch.cat(parts) for parts in found])


def angle_sums(x_XND: Tensor) -> Tensor:
    """Angular distances of every two places, in shares of pi, summed over the rows.

    Args:
        x_XND: the residual stream at the last token.

    Returns:
        float64 (X, X). The arccos is steep where vectors are parallel, so cosines are taken in
        float64 and clamped to [-1, 1].
    """
    sums_XX = torch.zeros(len(x_XND), len(x_XND), dtype=torch.float64)
    for x_XD in x_XND.unbind(1):
        unit_XD = torch.nn.functional.normalize(x_XD.double(), dim=1, eps=0.0)
        sums_XX += (unit_XD @ unit_XD.T).clamp(-1, 1).arccos() / math.pi
    return sums_XX


def by_size(mean_XX: Tensor) -> list[list[float]]:
    """Distances by size of the block: entry n - 1 has d(x_l, x_{l+n}) for l = 0 to L - n."""
    return [mean_XX.diagonal(n).tolist() for n in range(1, len(mean_XX))]


def choose(task: Task) -> Choice:
    """The n layers in a row at whose two ends the residual stream differs least.

    Returns:
        Their choice, with `distances`: those of every size of the block, from the same pass.

    Raises:
        NonFiniteError: NaN or infinity in the residual stream.
    """
    blocks = task.open()
    x_XND = final_tokens(blocks, task)
    sums_XX = angle_sums(x_XND).to(task.device)
    num_rows = torch.tensor(float(x_XND.shape[1]), dtype=torch.float64, device=task.device)
    task.comm.all_reduce_(sums_XX)
    task.comm.all_reduce_(num_rows)
    mean_XX = (sums_XX / num_rows).cpu()
    if not mean_XX.isfinite().all():
        place = int((~mean_XX.isfinite()).any(1).nonzero()[0])
        raise NonFiniteError(
            f"drop: the residual stream before layer {place} is not finite, or zero; weights or "
            "activations overflow in this dtype"
        )
    distances = by_size(mean_XX)
    of_size = distances[task.num_dropped - 1]
    first = of_size.index(min(of_size))
    units = tuple(Unit(layer) for layer in range(first, first + task.num_dropped))
    return Choice(units, {"distances": distances})


RULE = Rule("angular", "the block of layers that turns the residual stream least", choose)
