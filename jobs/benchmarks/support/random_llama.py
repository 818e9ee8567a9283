"""Llama models with random weights: whole, or written to disk one block at a time.

Random weights show what work costs. They say nothing of quality.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig

from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.files import embedded_path

_SCALE = 0.02

SHAPES: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 32,
    },
    "llama-3.1-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
        "num_key_value_heads": 8, "num_hidden_layers": 80,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 16,
    },
    "bench-1k": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_hidden_layers": 4,
    },
    "bench-2k": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
        "num_key_value_heads": 4, "num_hidden_layers": 22,
    },
    "bench-512": {
        "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
        "num_key_value_heads": 4, "num_hidden_layers": 8,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2,
    },
}  # fmt: skip
"""Shapes by name: three public Llama models, and four for benchmarks on a CPU."""


def llama_config(shape: str, num_blocks: int, num_positions: int, vocab_size: int) -> LlamaConfig:
    """Configuration of a Llama of `shape` with `num_blocks` blocks and untied embeddings."""
    sizes: dict[str, Any] = {**SHAPES[shape], "num_hidden_layers": num_blocks}
    return LlamaConfig(
        **sizes,
        vocab_size=vocab_size,
        max_position_embeddings=num_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def check_blocks(
    shape: str, num_blocks: int, flag: str, shapes: Mapping[str, Mapping[str, int]] = SHAPES
) -> int:
    """How many blocks `shape` has, which must be at least `num_blocks`, given as option `flag`.

    Raises:
        InputError: there is no such shape, or it has fewer blocks.
    """
    if shape not in shapes:
        raise InputError(f"--shape {shape}: use one of {', '.join(shapes)}")
    most = shapes[shape]["num_hidden_layers"]
    if not 1 <= num_blocks <= most:
        raise InputError(f"{flag} {num_blocks}: {shape} has {most} {flag.lstrip('-')}")
    return most


def random_rows(num_rows: int, length: int, vocab_size: int, seed: int) -> TokenRows:
    """Rows of random tokens, each of them one document."""
    generator = torch.Generator().manual_seed(seed)
    return TokenRows.whole(torch.randint(0, vocab_size, (num_rows, length), generator=generator))


def random_model(
    config: LlamaConfig, seed: int, dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """A model with normal weights of standard deviation 0.02, made on `device`.

    The same on every process with the same device, seed and config.

    Cost: the weights once; nothing is made in another dtype or place first.
    """
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        model.to(dtype)
    model.to_empty(device=device)
    # Buffers that are computed from the config were emptied with the rest.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, _SCALE, generator=generator)
    return model.eval()


def with_linears(
    config: LlamaConfig, make: Callable[[tuple[int, int]], nn.Module], device: str
) -> PreTrainedModel:
    """A random bfloat16 model whose blocks have a layer of `make` for each linear one.

    Args:
        config: of the model, which is never dense as a whole.
        make: from (rows, columns) to what stands there, on `device`.
        device: of all else.
    """
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            own = make((module.out_features, module.in_features))
            model.model.layers.set_submodule(name, own)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                made = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                made.normal_(0.0, _SCALE) if weight.ndim > 1 else made.fill_(1.0)
                # With gradients, as `from_pretrained` leaves it: torch multiplies the last of
                # several tokens by a weight without by way of a copy of the whole weight.
                module.register_parameter(name, nn.Parameter(made))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    ready: PreTrainedModel = model.eval()
    return ready


def write_checkpoint(
    folder: Path, config: LlamaConfig | Qwen3MoeConfig, seed: int, dtype: torch.dtype
) -> None:
    """Write a model folder with random weights and a tokenizer, one file per block.

    The folder appears whole or not at all. The tokenizer is the embedded model's, so that the
    commands accept the folder; `config.vocab_size` must be at least its 1024.

    Cost: one block's weights in memory.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(partial)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded_path() / name, partial / name)
    generator = torch.Generator().manual_seed(seed)
    shard_of: dict[str, str] = {}
    num_bytes = 0
    for index, shapes in enumerate(_pieces(config)):
        shard = f"model-{index + 1:05d}-of-{config.num_hidden_layers + 2:05d}.safetensors"
        tensors = {name: _random(shape, dtype, generator) for name, shape in shapes.items()}
        save_file(tensors, partial / shard, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(tensors, shard)
        num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index_json = {"metadata": {"total_size": num_bytes}, "weight_map": shard_of}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def linear_shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """(rows, columns) of the linear layers of one block, in the order q k v o gate up down."""
    return [
        (shape[0], shape[1])
        for shape in _block_shapes(config, "model.layers.0").values()
        if len(shape) == 2
    ]


def block_num_weights(config: LlamaConfig) -> int:
    """Weights of one decoder block."""
    return sum(
        torch.Size(shape).numel() for shape in _block_shapes(config, "model.layers.0").values()
    )


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0.0, _SCALE, generator=generator)


def _pieces(config: LlamaConfig | Qwen3MoeConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each file: embeddings, every block, the head."""
    yield {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for index in range(config.num_hidden_layers):
        yield _block_shapes(config, f"model.layers.{index}")
    yield {
        "model.norm.weight": (config.hidden_size,),
        "lm_head.weight": (config.vocab_size, config.hidden_size),
    }


def _block_shapes(config: LlamaConfig | Qwen3MoeConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    narrow = (config.num_key_value_heads or config.num_attention_heads) * head
    places, special = ["mlp"], {}
    if isinstance(config, Qwen3MoeConfig):
        inner = config.moe_intermediate_size
        places = [f"mlp.experts.{number}" for number in range(config.num_experts)]
        special = {
            f"{prefix}.self_attn.q_norm.weight": (head,),
            f"{prefix}.self_attn.k_norm.weight": (head,),
            f"{prefix}.mlp.gate.weight": (config.num_experts, hidden),
        }
    return {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
        f"{prefix}.self_attn.k_proj.weight": (narrow, hidden),
        f"{prefix}.self_attn.v_proj.weight": (narrow, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        **special,
        **{
            f"{prefix}.{place}.{name}.weight": shape
            for place in places
            for name, shape in (
                ("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)),
                ("down_proj", (hidden, inner)),
            )
        },
    }  # fmt: skip
