"""On one worker: how fast the exported folders answer, and one layer of a large model.

A small model's products take less time than calling them, so that what packing is worth does not
show in it; a layer of 14336 x 4096 with random weights beside it shows what a large one would gain.
Sides take turns, and medians count, since other work may be on the machine. Shape suffixes: O rows,
I columns, T tokens.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from cluster.runtime.worker import WorkerContext
from sparsify.evaluation.writing import num_positions
from sparsify.integrations.linear import PackedLinear  # and transformers reads packed folders
from sparsify.models.load import DTYPES, quiet_transformers
from sparsify.packed.layout import Layer, Scheme, packed_layers
from sparsify.pattern import Pattern

_PROMPT_TOKENS, _NEW_TOKENS = 16, 32

_ROUNDS = 3

_LAYER = (14336, 4096)  # gate and up of Llama 3.1 8B

_GROUP_SIZE = 128

_LAYER_ROUNDS = 5


def measure_speed(
    context: WorkerContext, dense: Path, folders: list[Path], dtype: str, max_gb: float
) -> dict[str, Any] | None:
    """Seconds to the first token and of each further one, of the dense model and packed folders.

    Args:
        context: of the worker.
        dense: the dense model's folder.
        folders: exported ones; those that are not packed compute as the dense one does.
        dtype: of all of them, by name.
        max_gb: of the dense weights, beyond which nothing is measured.

    Returns:
        Plain values, or None beyond `max_gb`.

    Cost: the models in memory together, and 1 GB; seconds for small models.
    """
    num_bytes = sum(path.stat().st_size for path in dense.glob("model*.safetensors"))
    if num_bytes > max_gb * 1e9:
        return None
    device = torch.device(context.device)
    paths = {"dense": dense, **{path.name: path for path in folders if packed_layers(path)}}
    with quiet_transformers():
        models = {name: _load(path, dtype, device) for name, path in paths.items()}
    sizes = {name: sum(p.nbytes for p in model.parameters()) for name, model in models.items()}
    times = _generation_s(models)
    return {
        "dtype": dtype,
        "device": _device_name(device),
        "num_threads": torch.get_num_threads(),
        "models": [
            {"name": name, "num_bytes": sizes[name], **times[name]} for name in models
        ],
        "layer": _layer_speed(device),
    }  # fmt: skip


def _load(folder: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False
    )
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _generation_s(models: dict[str, PreTrainedModel]) -> dict[str, dict[str, float | None]]:
    """first_token_s and token_s (None where a model has no positions for more) of each model."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"first_token_s": [], "token_s": []} for name in models
    }
    for turn in range(_ROUNDS + 1):
        for name, model in models.items():
            first_s = _write_s(model, 1)
            room = min(_NEW_TOKENS, num_positions(model.config) - _PROMPT_TOKENS - 1)
            further_s = (_write_s(model, 1 + room) - first_s) / room if room > 0 else None
            if turn > 0:  # the first prepares kernels and caches
                found[name]["first_token_s"].append(first_s)
                if further_s is not None:
                    found[name]["token_s"].append(further_s)
    return {
        name: {key: statistics.median(times) if times else None for key, times in own.items()}
        for name, own in found.items()
    }


@torch.inference_mode()
def _write_s(model: PreTrainedModel, num_tokens: int) -> float:
    """Seconds in which so many tokens follow a prompt, the likeliest ones."""
    width = model.config.get_text_config().vocab_size
    ids_1T = torch.arange(_PROMPT_TOKENS, device=model.device)[None] % width
    config = GenerationConfig(
        max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, use_cache=True,
        pad_token_id=0,
    )  # fmt: skip
    generate: Any = model.generate
    started_s = _now_s(model.device)
    generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=config)
    return _now_s(model.device) - started_s


def _layer_speed(device: torch.device) -> dict[str, Any]:
    """Median seconds of one token through a large layer, dense and packed, random weights."""
    num_rows, num_columns = _LAYER
    inputs_TI = torch.randn(1, num_columns, device=device)
    sides: dict[str, tuple[int, Callable[[], Tensor]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight_OI = torch.randn(num_rows, num_columns, device=device, dtype=dtype)
        x_TI = inputs_TI.to(dtype)
        name = f"dense {str(dtype).removeprefix('torch.')}"
        sides[name] = (weight_OI.nbytes, _bound(functional.linear, x_TI, weight_OI))
    schemes = {
        "2:4 bfloat16": Scheme(), "2:4 FP8": Scheme("fp8"),
        "2:4 INT8": Scheme("int", 8, _GROUP_SIZE), "2:4 INT4": Scheme("int", 4, _GROUP_SIZE),
    }  # fmt: skip
    x_TI = inputs_TI.bfloat16()
    for name, scheme in schemes.items():
        module = random_packed(Layer(_LAYER, scheme, Pattern.parse("2:4"))).to(device)
        num_bytes = sum(part.nbytes for part in module.parameters())
        sides[name] = (num_bytes, _bound(module, x_TI))
    taken_s: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for turn in range(_LAYER_ROUNDS + 1):
            for name, (_, call) in sides.items():  # the others' weights push its own out of caches
                started_s = _now_s(device)
                call()
                if turn > 0:
                    taken_s[name].append(_now_s(device) - started_s)
    return {
        "rows": num_rows,
        "columns": num_columns,
        "sides": [
            {"name": name, "num_bytes": num_bytes, "median_s": statistics.median(taken_s[name])}
            for name, (num_bytes, _) in sides.items()
        ],
    }


def _bound(call: Callable[..., Tensor], *arguments: Tensor) -> Callable[[], Tensor]:
    return lambda: call(*arguments)


def random_packed(layer: Layer) -> PackedLinear:
    """A packed layer of random values, positions and scales."""
    module = PackedLinear(layer, torch.bfloat16, has_bias=False)
    pairs = torch.tensor([a | b << 2 for a, b in itertools.combinations(range(4), 2)])
    low, high = pairs.to(torch.uint8)[torch.randint(6, (2, *module.weight_indices.shape))]
    module.weight_indices.copy_(low | high << 4)
    if layer.scheme.type in ("float", "fp8"):
        module.weight.copy_(torch.randn(module.weight.shape, dtype=torch.bfloat16))
    else:
        module.weight.random_()
    if module.weight_scales is not None:
        module.weight_scales.uniform_(0.01, 0.02)
    return module


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _now_s(device: torch.device) -> float:
    """Seconds of the clock; on a GPU when it has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
