"""One side of the whole model's benchmark on a GPU, in a process of its own.

    python -m jobs.benchmarks.sides.decode_cuda '{"side": ..., ...}' OUT.json

A Llama of transformers with random weights decodes one token for each prompt, as one CUDA graph
over the whole model: the prompt's keys and values are in a static cache, norms, rotary angles and
activations are compiled. Only the linear layers of the blocks differ between sides.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.models.llama import modeling_llama

from jobs.benchmarks.sides.decode import PROMPT_TOKENS, SCHEMES, config_of
from jobs.benchmarks.support.linear_sides_cuda import torch_int4
from jobs.benchmarks.support.random_llama import random_model, with_linears
from jobs.workers.speed import random_packed
from sparsify.kernels.cuda.card import elapsed_s
from sparsify.packed.layout import Layer
from sparsify.pattern import Pattern

SIDES = ("dense bfloat16", "dense int4", *SCHEMES)

_MOST_TOKENS = 256  # of the cache: the prompt, and as many steps as are timed

_REPLAYS = 100


class DenseInt4(nn.Module):
    """torch's own INT4 layer on a GPU, random."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        super().__init__()
        self.call, packed, scales_GO2 = torch_int4(num_rows, num_columns)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales_GO2 * 0.02, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O) in bfloat16."""
        output = self.call(x.reshape(-1, x.shape[-1]), self.packed, self.scales)
        return output.view(*x.shape[:-1], -1)


def build(side: str, shape: str, vocab_size: int, device: str) -> PreTrainedModel:
    """The model of a side, never dense where its layers are packed."""
    config = config_of(shape, vocab_size)
    if side == "dense bfloat16":
        return random_model(config, 0, torch.bfloat16, device)

    def layer(size: tuple[int, int]) -> nn.Module:
        with torch.device(device):
            if side == "dense int4":
                return DenseInt4(*size)
            packed = random_packed(Layer(size, SCHEMES[side], Pattern.parse("2:4")))
        packed.arrange(device, torch.bfloat16)
        return packed

    return with_linears(config, layer, device)


def compile_small_parts() -> None:
    """What a layer has beside its linear layers becomes one kernel a piece, once for all layers."""
    llama: Any = modeling_llama
    llama.LlamaRMSNorm.forward = torch.compile(llama.LlamaRMSNorm.forward)
    llama.apply_rotary_pos_emb = torch.compile(llama.apply_rotary_pos_emb)
    product = torch.compile(lambda gate, up: nn.functional.silu(gate) * up)

    def forward(self: Any, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(product(self.gate_proj(x), self.up_proj(x)))
        return output

    llama.LlamaMLP.forward = forward


class Steps:
    """Decoding of `batch` prompts, a token each at a time; greedy."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        device = model.device
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=_MOST_TOKENS)
        generator = torch.Generator().manual_seed(batch)
        vocab_size = model.config.get_text_config().vocab_size
        ids_BT = torch.randint(0, vocab_size, (batch, PROMPT_TOKENS), generator=generator)
        self.position = torch.arange(PROMPT_TOKENS, device=device)
        self.ids_B1 = self._next(ids_BT.to(device))
        self.position = torch.full((1,), PROMPT_TOKENS, device=device)

    def once(self) -> None:
        """One token for each prompt."""
        self.ids_B1.copy_(self._next(self.ids_B1))
        self.position += 1

    def _next(self, ids_BT: Tensor) -> Tensor:
        call: Any = self.model
        logits_B1V = call(
            ids_BT, past_key_values=self.cache, cache_position=self.position,
            position_ids=self.position[None], use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        chosen_B1: Tensor = logits_B1V[:, -1].argmax(-1, keepdim=True)
        return chosen_B1


@torch.inference_mode()
def step_s(model: PreTrainedModel, batch: int) -> float:
    """Median seconds of a step of `batch` prompts, as a graph's replay."""
    steps = Steps(model, batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            steps.once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps.once()
    times_s = [elapsed_s(graph.replay) for _ in range(_REPLAYS)]
    return statistics.median(times_s[10:])


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step by batch; weights and most memory, in bytes.

    Args:
        task: side, shape, vocab_size, batches (list).
    """
    torch.manual_seed(0)
    compile_small_parts()
    model = build(task["side"], task["shape"], task["vocab_size"], "cuda")
    torch.cuda.reset_peak_memory_stats()
    rows = [{"batch": batch, "token_s": step_s(model, batch)} for batch in task["batches"]]
    unique = {id(weight): weight.nbytes for weight in model.parameters()}
    return {
        "side": task["side"], "rows": rows, "num_bytes": sum(unique.values()),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(sys.argv[1]))), encoding="utf-8")
