"""One process that computes one loss once and prints the most memory it took for it, in bytes.

`python -m jobs.benchmarks.sides.loss '{"side": "head", ...}'`; see `loss.peak_bytes`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from jobs.benchmarks.support.device import forget_peak, peak_bytes
from sparsify.data.rows import chunks
from sparsify.distillation import TokenCounts, head_terms
from sparsify.distillation.head_loss import HeadProducts, Teacher, head_loss
from sparsify.models.lm_head import Head
from sparsify.params import LossWeights


def build(
    side: str, tokens: int, vocabulary: int, width: int, chunk: int, dtype: str, device: str,
) -> Callable[[], Any]:  # fmt: skip
    """One forward and backward pass of a side over random tensors.

    Args:
        side: head (the loss from hidden states), operations (the same without its kernel, which
            only a GPU has), naive (autograd through all logits) or products (the matrix products
            that head makes, on the same chunks, and nothing else).
        tokens: N.
        vocabulary: V.
        width: D, of both models.
        chunk: tokens of a chunk.
        dtype: of hidden states and weights.
        device: cpu or cuda.
    """
    generator = torch.Generator(device).manual_seed(0)
    kind = getattr(torch, dtype)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return drawn.mul_(scale).to(kind)

    hidden = normal(tokens, width, scale=1.0).requires_grad_()
    states = normal(tokens, width, scale=1.0)
    weight, other = (normal(vocabulary, width, scale=2 / width**0.5) for _ in range(2))
    weight.requires_grad_()

    def head() -> Any:
        counts = TokenCounts(tokens, tokens)
        loss, _ = head_loss(
            hidden, Head(weight), LossWeights(), counts, Teacher(states, Head(other)),
            chunk_tokens=chunk,
        )  # fmt: skip
        loss.backward()
        return loss.detach()

    def operations() -> Any:
        kept, head_terms.has_kernel = head_terms.has_kernel, lambda logits: False
        try:
            return head()
        finally:
            head_terms.has_kernel = kept

    def naive() -> Any:
        with torch.no_grad():
            log_p = (states @ other.T).float().log_softmax(-1)
        log_q = (hidden @ weight.T).float().log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def products() -> Any:
        student = HeadProducts(hidden, weight, torch.float32)
        teacher = HeadProducts(states, other, torch.float32)
        z_CV, t_CV = (hidden.new_empty((chunk, vocabulary), dtype=torch.float32) for _ in range(2))
        grad_ND = torch.empty_like(hidden)
        grad_VD = torch.zeros_like(weight, dtype=torch.float32)
        slope_CV = student.half_buffer(chunk)
        slope_CV = z_CV if slope_CV is None else slope_CV.zero_()
        for part in chunks(tokens, chunk):
            rows = part.stop - part.start
            student.logits_(z_CV[:rows], student.chunk(part), None)
            teacher.logits_(t_CV[:rows], teacher.chunk(part), None)
            student.hidden_grad_(grad_ND[part], slope_CV[:rows], 1.0)
            student.add_weight_grad_(grad_VD, slope_CV[:rows], student.chunk(part), 1.0)
        return grad_VD

    steps = {"head": head, "operations": operations, "naive": naive, "products": products}

    def step() -> Any:
        hidden.grad = weight.grad = None
        return steps[side]()

    step.leaves = (hidden, weight)  # type: ignore[attr-defined]
    return step


def difference(**timed: Any) -> float:
    """Relative distance of the kernel's gradients from those of PyTorch's operations, on a GPU: the
    larger one of hidden states and head."""
    found = []
    for side in ("head", "operations"):
        step = build(side, **timed)
        step()
        found.append([leaf.grad.double() for leaf in step.leaves])  # type: ignore[attr-defined]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))


def main(settings: dict[str, Any]) -> int:
    """Bytes that one pass took on top of its inputs."""
    device = settings["device"]
    if device == "cpu":
        torch.set_num_threads(1)
        # What libraries take for themselves.
        build(**(settings | {"tokens": 8, "vocabulary": 256}))()
    step = build(**settings)
    forget_peak(device)
    before = peak_bytes(device)
    step()
    return peak_bytes(device) - before


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))
