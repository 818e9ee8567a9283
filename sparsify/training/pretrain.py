"""Train a small causal language model from scratch: how the embedded default was made.

One process, next-token cross-entropy, AdamW. The order of the rows depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sparsify.data.split import shuffled
from sparsify.errors import NonFiniteError
from sparsify.params import PretrainParams
from sparsify.training.schedule import learning_rate


def pretrain(
    model: torch.nn.Module,
    rows: torch.Tensor,
    params: PretrainParams,
    seed: int,
    on_step: Callable[[int, int, float], None],
) -> int:
    """Train `model` for one pass over `rows`, in place.

    Args:
        model: a causal LM whose forward takes `input_ids` and returns `.logits`.
        rows: (rows, sequence_length) int64 token ids.
        params: the recipe.
        seed: orders the rows.
        on_step: called with (step, number of steps, loss in nats per token).

    Returns:
        Number of tokens trained on.

    Raises:
        NonFiniteError: the loss is not finite; names the step.

    Cost: 6 FLOPs per parameter and token, plus attention.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": params.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=params.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    order = torch.tensor(shuffled(len(rows), seed))
    num_steps = len(rows) // params.batch_size
    device = next(model.parameters()).device
    model.train()
    for step in range(num_steps):
        batch = rows[order[step * params.batch_size : (step + 1) * params.batch_size]].to(device)
        scale = learning_rate(1.0, step, num_steps, params.num_warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = params.learning_rate * scale
        with torch.autocast(device.type, torch.bfloat16, enabled=params.bf16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), params.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if value != value or value in (float("inf"), float("-inf")):
            raise NonFiniteError(f"pretrain: the loss is {value} at step {step}; lower the rate")
        on_step(step, num_steps, value)
    return num_steps * params.batch_size * rows.shape[1]
