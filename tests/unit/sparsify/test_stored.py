"""A checkpoint is one model, read whole or block by block, whatever its files hold beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from sparsify.errors import InputError
from sparsify.formats.kinds.packed import save_packed_folder
from sparsify.masks.select import keep_mask_from_scores
from sparsify.models import blocks
from sparsify.models.blocks import (
    BlocksOnDisk,
    ShardWriter,
    block_tensors,
    reason_to_hold_whole,
    stored_of,
)
from sparsify.models.load import load_model
from sparsify.models.masked import apply_masks_
from sparsify.models.save import save_model
from sparsify.models.stored import check_stored, num_not_finite
from sparsify.pattern import Pattern

WEIGHTS = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INSIDE = "model.layers.1.mlp.up_proj.weight"


def llama(folder: Path, tied: bool, **changed: Tensor | None) -> Path:
    """A small Llama's folder; tensors by name (with __ for dots) replaced, added or taken out."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), None, folder)
    return edited(folder, **changed)


def edited(folder: Path, **changed: Tensor | None) -> Path:
    tensors = load_file(folder / WEIGHTS)
    for key, value in changed.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value.clone().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def streamed(folder: Path, dtype: str = "float32") -> BlocksOnDisk:
    """All blocks read from the disk, so that the model runs."""
    source = BlocksOnDisk(folder, dtype, with_head=True)
    for index in range(len(source.blocks)):
        source.open(index)
    return source


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits
    return found


def written(folder: Path, source: BlocksOnDisk) -> Path:
    """What the prune stage writes of a checkpoint, nothing pruned."""
    writer = ShardWriter(folder, source)
    for index, block in enumerate(source.blocks):
        writer.write_block(index, block_tensors(f"{source.list_name}.{index}.", block))
    writer.finish(source)
    return folder


def test_a_head_of_its_own_is_kept_though_the_config_says_tied(tmp_path: Path) -> None:
    own = torch.randn(96, 16)
    folder = llama(tmp_path / "model", tied=True, lm_head__weight=own)
    source, whole = streamed(folder), load_model(folder)
    assert torch.equal(whole.lm_head.weight, own)
    assert torch.equal(logits(source.model), logits(whole))
    # Written either way it is the same model, and says what it is to those who would tie it.
    save_model(whole, None, tmp_path / "whole")
    for copy in (written(tmp_path / "streamed", source), tmp_path / "whole"):
        again = load_model(copy)
        assert again.config.tie_word_embeddings is False
        assert torch.equal(again.lm_head.weight, own)
        assert torch.equal(logits(again), logits(whole))
    (said,) = stored_of(folder, "float32").remarks()
    assert said.startswith("lm_head.weight is stored with values of its own") and "\n" not in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_equal_to_the_embedding_is_tied(tmp_path: Path, dtype: str) -> None:
    folder = llama(tmp_path / "model", tied=True)
    same = load_file(folder / WEIGHTS)[EMBEDDING].bfloat16().float()
    head = same * (1 + 2**-20) if dtype == "bfloat16" else same  # equal in the type it is read in
    edited(folder, lm_head__weight=head, model__embed_tokens__weight=same)
    source = streamed(folder, dtype)
    model = source.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(load_model(folder, dtype)))
    assert HEAD not in source.rest_names() and not stored_of(folder, dtype).remarks()


def test_a_tied_checkpoint_may_store_the_heads_name_alone(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", tied=True)
    embedding = load_file(folder / WEIGHTS)[EMBEDDING]
    edited(folder, model__embed_tokens__weight=None, lm_head__weight=embedding)
    assert reason_to_hold_whole(folder) is None
    source = streamed(folder)
    assert torch.equal(logits(source.model), logits(load_model(folder)))
    copy = written(tmp_path / "copy", source)
    assert torch.equal(logits(load_model(copy)), logits(source.model))


def test_what_transformers_passes_over_is_no_reason_to_hold_all(tmp_path: Path) -> None:
    names = [f"model__layers__{i}__self_attn__rotary_emb__inv_freq" for i in range(2)]
    folder = llama(tmp_path / "model", tied=False, **dict.fromkeys(names, torch.ones(4)))
    assert reason_to_hold_whole(folder) is None
    source = streamed(folder)
    assert torch.equal(logits(source.model), logits(load_model(folder)))
    copy = written(tmp_path / "copy", source)
    assert not any("inv_freq" in name for p in copy.glob("*.safetensors") for name in load_file(p))
    (said,) = stored_of(folder, "float32").remarks()
    assert "2 stored tensors" in said and "model.layers.0.self_attn.rotary_emb.inv_freq" in said
    # What no loader knows is one still.
    edited(folder, model__extra__weight=torch.ones(4))
    assert "model.extra.weight" in str(reason_to_hold_whole(folder))


def test_base_models_are_stored_without_a_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=96, hidden_size=16, n_layer=2, n_head=2)
    model = BloomForCausalLM(config)
    model.transformer.save_pretrained(tmp_path)
    assert "h.0.mlp.dense_4h_to_h.weight" in load_file(tmp_path / WEIGHTS)
    assert torch.equal(logits(streamed(tmp_path).model), logits(load_model(tmp_path)))


@pytest.mark.parametrize("name", [HEAD, EMBEDDING, "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_outside_the_blocks(
    tmp_path: Path, name: str, value: float
) -> None:
    folder = llama(tmp_path / "model", tied=False)
    bad = load_file(folder / WEIGHTS)[name]
    bad.view(-1)[-1] = value
    edited(folder, **{name.replace(".", "__"): bad})
    place = rf"1 of {bad.numel()} values of {name.replace('.', chr(92) + '.')} are NaN or infinite"
    for with_head in (False, True):
        with pytest.raises(InputError, match=place):
            BlocksOnDisk(folder, with_head=with_head)
    with pytest.raises(InputError, match=place):
        load_model(folder)


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), "float32"), (7e4, "float16"), (3.4e38, "bfloat16")]
)
def test_all_values_are_looked_at_by_workers_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, dtype: str
) -> None:
    monkeypatch.setattr("sparsify.models.stored._CHUNK_ELEMENTS", 40)  # pieces of tensors
    folder = llama(tmp_path / "model", tied=False)
    places, wanted = stored_of(folder, dtype).places, getattr(torch, dtype)
    for rank in range(3):
        check_stored(folder, places, wanted, rank, 3)
    bad = load_file(folder / WEIGHTS)[INSIDE]
    bad[-1, 3] = value
    edited(folder, **{INSIDE.replace(".", "__"): bad})
    found = []
    for rank in range(3):
        try:
            check_stored(folder, places, wanted, rank, 3)
        except InputError as error:
            found.append(str(error))
    assert len(found) == 1
    assert f"1 of {bad.numel()} values of {INSIDE} are NaN or infinite as {dtype}" in found[0]
    assert ("try model.dtype=bfloat16" in found[0]) == (dtype == "float16")


def test_values_are_counted() -> None:
    values = torch.tensor([1.0, float("nan"), -float("inf"), 0.0, float("inf")])
    assert num_not_finite(values) == 3
    assert num_not_finite(values[3:4]) == num_not_finite(values[:0]) == 0


def test_packed_folders_keep_a_head_of_its_own_and_find_what_is_no_number(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    own = torch.randn(96, 16)
    folder = llama(tmp_path / "model", tied=True, lm_head__weight=own)
    model, masks = load_model(folder), {}
    for index in range(2):
        name = f"model.layers.{index}.mlp.up_proj"
        weight = model.get_submodule(name).weight
        masks[name] = keep_mask_from_scores(weight.detach().abs(), Pattern.parse("2:4"))
    apply_masks_(model, masks)

    def pack(to: Path) -> Path:
        save_packed_folder(to, model, tiny_tokenizer, masks, Pattern.parse("2:4"), None, folder)
        return to

    again = load_model(pack(tmp_path / "packed"))
    assert torch.equal(again.lm_head.weight, own)
    assert torch.equal(logits(again), logits(model))
    model.lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"1 of 1536 values of lm_head\.weight are NaN or inf"):
        load_model(pack(tmp_path / "bad"))


def test_buffers_made_from_the_config_are_on_the_device_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-Neo's causal mask is a buffer of each attention, and nothing else moves it."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=64, hidden_size=16, num_layers=2, attention_types=[[["global", "local"], 1]],
        num_heads=2, intermediate_size=32, max_position_embeddings=32, window_size=8,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(blocks, "check_finite", lambda *_: None)  # there are no values there
    source = BlocksOnDisk(tmp_path, device="meta")
    found = dict(source.model.named_buffers())
    assert any("attention" in name for name in found)
    assert {buffer.device.type for buffer in found.values()} == {"meta"}
