"""One side of the whole model's benchmark, in a process of its own so that its memory is its own.

    python -m jobs.benchmarks.sides.decode '{"side": ..., ...}' OUT.json

A Llama with random weights, dense or with packed layers as transformers holds them after `import
sparsify.integrations`, answers prompts; the seconds to every token are kept. Shape suffixes: O
rows, I columns, B prompts, T tokens.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from jobs.benchmarks.support.device import peak_bytes
from jobs.benchmarks.support.random_llama import SHAPES, random_model, with_linears
from jobs.workers.speed import random_packed
from sparsify.integrations.dense import speed_up_dense
from sparsify.packed.layout import Layer, Scheme
from sparsify.pattern import Pattern

GROUP_SIZE = 128

SCHEMES = {
    "bfloat16": Scheme(), "float8": Scheme("fp8"), "int8": Scheme("int", 8, GROUP_SIZE),
    "int4": Scheme("int", 4, GROUP_SIZE),
}  # fmt: skip

SIDES = ("dense float32", "dense bfloat16", "dense int4", *SCHEMES)
"""Dense INT4 and packed layers are in a bfloat16 model, whose embeddings and head are dense."""

PROMPT_TOKENS = 32

NEW_TOKENS = 12  # after the first, whose times' median counts


class DenseInt4(nn.Module):
    """torch's own INT4 layer on a CPU, random: codes with a scale and a zero for 128 columns."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        super().__init__()
        codes_OI = torch.randint(0, 16, (num_rows, num_columns), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
        self.packed = nn.Parameter(packed, requires_grad=False)
        scales_GO2 = torch.rand(num_columns // GROUP_SIZE, num_rows, 2).mul(0.02).bfloat16()
        self.scales = nn.Parameter(scales_GO2, requires_grad=False)
        self.num_rows = num_rows

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O) in bfloat16."""
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        flat = product(x.reshape(-1, x.shape[-1]), self.packed, GROUP_SIZE, self.scales)
        output: Tensor = flat.view(*x.shape[:-1], self.num_rows)
        return output


class _Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


def config_of(shape: str, vocab_size: int) -> LlamaConfig:
    """A Llama of this shape; the one of 1B has tied embeddings, as the public one."""
    sizes: dict[str, Any] = {**SHAPES[shape]}
    return LlamaConfig(
        **sizes, vocab_size=vocab_size, max_position_embeddings=2048,
        tie_word_embeddings=shape == "llama-3.2-1b", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def build(side: str, config: LlamaConfig) -> PreTrainedModel:
    """The model of a side, never dense where its layers are packed."""
    if side in ("dense float32", "dense bfloat16"):
        dtype = torch.float32 if side.endswith("32") else torch.bfloat16
        return random_model(config, 0, dtype, "cpu")

    def layer(size: tuple[int, int]) -> nn.Module:
        if side == "dense int4":
            return DenseInt4(*size)
        return random_packed(Layer(size, SCHEMES[side], Pattern.parse("2:4")))

    model = with_linears(config, layer, "cpu")
    if side != "dense int4":
        speed_up_dense(model)  # as where transformers loads a packed folder
    return model


@torch.inference_mode()
def answer(model: PreTrainedModel, batch: int) -> dict[str, float]:
    """first_token_s and token_s (median) of `batch` prompts of 32 tokens at once."""
    generator = torch.Generator().manual_seed(batch)
    ids_BT = torch.randint(
        0, model.config.get_text_config().vocab_size, (batch, PROMPT_TOKENS), generator=generator
    )
    num_tokens = 1 + NEW_TOKENS
    config = GenerationConfig(
        max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0,
        use_cache=True,
    )  # fmt: skip
    clock = _Clock()
    generate: Any = model.generate
    started_s = time.perf_counter()
    generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config, streamer=clock
    )
    _, first_s, *later_s = clock.times_s  # the prompt comes before them all
    steps = [after - before for before, after in zip([first_s, *later_s], later_s, strict=False)]
    return {"first_token_s": first_s - started_s, "token_s": statistics.median(steps)}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Times by threads and batch, as far as `budget_s` allows; weights and most memory, in bytes.

    Args:
        task: side, shape, vocab_size, threads (list), batches (list; with fewer threads than the
            most only the first), budget_s.
    """
    torch.manual_seed(0)
    torch.set_num_threads(max(task["threads"]))
    model = build(task["side"], config_of(task["shape"], task["vocab_size"]))
    answer(model, 1)  # kernels and the order of packed layers are made ready
    rows, left_out = [], []
    until_s = time.monotonic() + task["budget_s"]
    for threads in sorted(task["threads"]):
        torch.set_num_threads(threads)
        last_s, last_batch = 0.0, 1
        is_most = threads == max(task["threads"])
        for batch in task["batches"] if is_most else task["batches"][:1]:
            if time.monotonic() + last_s * batch / last_batch > until_s:
                left_out.append(batch)
                continue
            started_s = time.monotonic()
            rows.append({"threads": threads, "batch": batch, **answer(model, batch)})
            last_s, last_batch = time.monotonic() - started_s, batch
    unique = {id(weight): weight.nbytes for weight in model.parameters()}
    return {
        "side": task["side"], "rows": rows, "batches_left_out": left_out,
        "num_bytes": sum(unique.values()), "peak_bytes": peak_bytes("cpu"),
    }  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(sys.argv[1]))), encoding="utf-8")
