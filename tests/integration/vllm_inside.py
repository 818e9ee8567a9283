"""Within vLLM's own environment: what a packed model holds there, and what is refused.

    python vllm_inside.py CASES

CASES is JSON: `whole`, a packed folder; `wrong`, more of them that must not load. The last line
of the output is JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import QKVParallelLinear

from sparsify.integrations.linear import PackedLinear
from sparsify.integrations.vllm.plugin import TwofourConfig, TwofourLinearMethod
from sparsify.packed.layout import Layer, Scheme
from sparsify.pattern import Pattern

HOW = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "enforce_eager": True}


def refused(folder: str) -> str:
    """What vLLM says of a folder before it starts any process for it."""
    try:
        EngineArgs(model=folder, **HOW).create_engine_config()
    except ValueError as error:
        return str(error)
    return ""


def held(folder: str) -> dict[str, Any]:
    """Layer name -> what computes it and its bytes, of a model as vLLM has loaded it."""
    engine: Any = LLM(folder, **HOW).llm_engine
    model = engine.model_executor.driver_worker.worker.model_runner.model
    return {
        name: {"kind": module.kind, "num_bytes": sum(p.nbytes for p in module.parameters())}
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
    }


def method(ways: dict[str, Scheme]) -> str:
    """What is said of a fused layer whose parts are stored in these ways."""
    pattern = Pattern.parse("2:4")
    layers = {f"m.{name}_proj": Layer((64, 256), way, pattern) for name, way in ways.items()}
    value = {
        "quant_method": "twofour", "version": 2, "pattern": "2:4",
        "schemes": {way.name: way.to_dict() for way in ways.values()},
        "layers": {n: {"scheme": one.scheme.name, "shape": [64, 256]} for n, one in layers.items()},
    }  # fmt: skip
    config = TwofourConfig.from_config(value)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    try:
        config.get_quant_method(QKVParallelLinear.__new__(QKVParallelLinear), "m.qkv_proj")
    except ValueError as error:
        return str(error)
    return ""


def cut() -> str:
    """What is said where two processes would cut a group of scales."""
    whole = Layer((64, 384), Scheme("int", 4, 128), Pattern.parse("2:4"))
    try:
        TwofourLinearMethod("m.down_proj", whole).create_weights(
            nn.Module(), 192, [64], 384, 64, torch.float32, weight_loader=None
        )
    except ValueError as error:
        return str(error)
    return ""


def main(cases: dict[str, Any]) -> None:
    four, eight = Scheme("int", 4, 128), Scheme("int", 8, 128)
    found = {
        "refused": [refused(folder) for folder in cases["wrong"]],
        "mixed": method({"q": four, "k": eight, "v": four}),
        "half": method({"q": four}),
        "cut": cut(),
        "held": held(cases["whole"]),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
