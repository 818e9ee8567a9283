"""The names under which a model is written: those that its pruned layers are looked for by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, PretrainedConfig

from sparsify.models.load import load_model, weight_files
from sparsify.models.save import save_model
from sparsify.models.structure import find_blocks, linears_of
from sparsify.tensors import tensor_names

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "keeps_names"),
    [
        (LlamaConfig(**SIZE), True),
        # Stored as language_model.model.layers, its modules are model.language_model.layers.
        (Gemma3Config(text_config=SIZE, vision_config=VISION, mm_tokens_per_image=4), False),
    ],
)
def test_every_layer_is_in_the_files_by_its_name(
    tmp_path: Path, config: PretrainedConfig, keeps_names: bool
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert save_model(model, None, tmp_path / "model") is keeps_names
    names = set()
    for path in weight_files(tmp_path / "model"):
        with safe_open(path, framework="pt") as file:
            names |= set(tensor_names(file))
    list_name, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for name in linears_of(block):
            assert f"{list_name}.{index}.{name}.weight" in names
    again = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
