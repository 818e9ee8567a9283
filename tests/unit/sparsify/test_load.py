"""Every way a model folder can be unusable, with a real broken folder for each."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, T5Config

from sparsify.errors import InputError
from sparsify.models.load import (
    build_model,
    check_checkpoint,
    check_sequence_length,
    load_model,
    load_pair,
    load_tokenizer,
)
from sparsify.models.save import save_model
from tests.conftest import message

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path, tiny_model_dir) -> Path:
    """A sound copy to break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """Split the weights into two shards with an index, as large checkpoints are."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file, metadata={"format": "pt"})
    weight_map = {k: file for file, keys in parts.items() for k in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def test_sound_folder_loads(folder):
    model, tokenizer = load_pair(folder)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.tensor([tokenizer("def f():")["input_ids"]])).logits.isfinite().all()
    assert {p.dtype for p in load_model(folder, "bfloat16").parameters()} == {torch.bfloat16}


def test_shards_load_to_the_same_weights(folder):
    expected = load_model(folder).state_dict()
    shard(folder)
    check_checkpoint(folder)
    got = load_model(folder).state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_loading_prints_nothing_and_leaves_settings_alone(folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(folder)
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError):
        load_model(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


# --- what check_checkpoint finds without reading weights -------------------------------------


def drop_folder(folder):
    shutil.rmtree(folder)


def folder_is_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def drop_config(folder):
    (folder / "config.json").unlink()


def corrupt_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:40])


def binary_config(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def list_config(folder):
    (folder / "config.json").write_text("[]")


def drop_model_type(folder):
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64}))


def custom_code(folder):
    edit_config(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Model"})


def unknown_type(folder):
    edit_config(folder, model_type="mine")


def encoder(folder):
    BertConfig().save_pretrained(folder)


def encoder_decoder(folder):
    T5Config().save_pretrained(folder)


def quantised(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def bad_value(folder):
    edit_config(folder, hidden_size="wide")


def drop_weights(folder):
    (folder / WEIGHTS).unlink()


def pickle_only(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def truncate(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def empty_file(folder):
    (folder / WEIGHTS).write_bytes(b"")


def garbage(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 8) + b"not json" + bytes(64))


def lfs_pointer(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def missing_shard(folder):
    shard(folder)
    (folder / "part-2.safetensors").unlink()


def truncated_shard(folder):
    shard(folder)
    path = folder / "part-2.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupt_index(folder):
    shard(folder)
    (folder / INDEX).write_text("{")


def empty_index(folder):
    shard(folder)
    (folder / INDEX).write_text("{}")


@pytest.mark.parametrize(
    ("break_it", "parts"),
    [
        (drop_folder, ["no such folder", "ORGANISATION/NAME"]),
        (folder_is_file, ["is a file, not a folder"]),
        (drop_config, ["config.json is missing"]),
        (corrupt_config, ["config.json", "not valid JSON"]),
        (binary_config, ["config.json", "not valid JSON"]),
        (list_config, ["config.json", "model_type"]),
        (drop_model_type, ["config.json", "model_type"]),
        (custom_code, ["'mine'", "code from the checkpoint", "refused"]),
        (unknown_type, ["'mine'", "not known"]),
        (encoder, ["'bert'", "no causal language model"]),
        (encoder_decoder, ["'t5'", "no causal language model"]),
        (quantised, ["quantised"]),
        (bad_value, ["config.json", "not a usable configuration"]),
        (drop_weights, ["no weights", WEIGHTS]),
        (pickle_only, ["pytorch_model.bin", "pickle", "safetensors"]),
        (truncate, [WEIGHTS, "truncated or corrupt"]),
        (empty_file, [WEIGHTS, "truncated or corrupt", "0 bytes"]),
        (garbage, [WEIGHTS, "truncated or corrupt"]),
        (lfs_pointer, [WEIGHTS, "git lfs pull"]),
        (missing_shard, ["part-2.safetensors", "missing"]),
        (truncated_shard, ["part-2.safetensors", "truncated or corrupt"]),
        (corrupt_index, [INDEX, "not valid JSON"]),
        (empty_index, [INDEX, "weight_map"]),
    ],
)
def test_broken_folder_is_refused_in_one_line(folder, break_it, parts):
    break_it(folder)
    for check in (check_checkpoint, load_model):
        with pytest.raises(InputError) as error:
            check(folder)
        assert all(part in message(error) for part in [*parts, folder.name])


def test_code_of_a_known_type_is_not_run(folder):
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    assert type(load_model(folder)).__name__ == "LlamaForCausalLM"


# --- what only the weights show --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            ["1 tensors are missing", "model.layers.1.mlp.up_proj.weight"],
        ),
        (
            lambda t: t.update({"model.layers.9.extra": torch.zeros(2)}),
            ["1 tensors are in the weights but not part", "model.layers.9.extra"],
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(65)}),
            ["model.norm.weight", "(65,)", "(64,)"],
        ),
    ],
)
def test_wrong_set_of_tensors_is_refused(folder, change, parts):
    edit_weights(folder, change)
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert all(part in message(error) for part in parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_is_named(folder, value):
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(folder, lambda tensors: tensors[name].view(-1)[5].fill_(value))
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert name in message(error)
    assert "1 of 4096" in message(error)


def test_overflow_in_float16_is_named(folder):
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"][0].fill_(1e5))
    assert load_model(folder, "bfloat16") is not None
    with pytest.raises(InputError, match=r"model.norm.weight.*bfloat16"):
        load_model(folder, "float16")


def test_unknown_dtype_is_refused(folder):
    with pytest.raises(InputError, match=r"model.dtype=int8.*float32, bfloat16, float16"):
        load_model(folder, "int8")


# --- tokenizer -------------------------------------------------------------------------------


def test_missing_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"no tokenizer; copy tokenizer.json"):
        load_tokenizer(folder)


def test_corrupt_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError) as error:
        load_tokenizer(folder)
    assert "tokenizer cannot be read" in message(error)


def test_tokenizer_of_another_model(folder, tiny_tokenizer):
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = 300
    rows = {"lm_head.weight", "model.embed_tokens.weight"}
    edit_weights(folder, lambda t: t.update({k: t[k][:300].clone() for k in rows}))
    config.save_pretrained(folder)
    with pytest.raises(InputError) as error:
        load_pair(folder)
    assert str(len(tiny_tokenizer) - 1) in message(error)
    assert "300 embedding rows" in message(error)


# --- the rest --------------------------------------------------------------------------------


def test_sequence_length_is_held_against_the_positions():
    config = LlamaConfig(max_position_embeddings=128)
    check_sequence_length(config, 128)
    with pytest.raises(InputError, match=r"data.sequence_length=129.*128 positions"):
        check_sequence_length(config, 129)


def test_embedded_word(monkeypatch, folder, tmp_path):
    monkeypatch.setattr("sparsify.files.__file__", str(tmp_path / "files.py"))
    with pytest.raises(InputError, match=r"model.path=embedded"):
        load_model("embedded")
    folder.rename(tmp_path / "embedded")
    assert load_model("embedded") is not None


def test_save_is_deterministic_and_round_trips(folder, tmp_path):
    model, tokenizer = load_pair(folder)
    first, second = tmp_path / "a", tmp_path / "b"
    save_model(model, tokenizer, first)
    save_model(*load_pair(first), second)
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    assert WEIGHTS in names
    assert not [n for n in names if n.endswith((".bin", ".pt"))]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for name, tensor in load_model(second).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_tied_embeddings_round_trip(tmp_path):
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), None, tmp_path / "tied")
    model = load_model(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_position_embeddings": "256"}, "expected int"),
        ({"rms_norm_eps": "1e-6"}, "expected float"),
        ({"hidden_size": 66}, "multiple"),
    ],
)
def test_a_field_of_the_config_that_is_wrong_is_named_with_the_reason(folder, change, reason):
    edit_config(folder, **change)
    with pytest.raises(InputError) as error:
        check_checkpoint(folder)
    assert reason in message(error)
    assert next(iter(change)) in message(error) or reason == "multiple"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "foo"),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
    ],
)
def test_a_config_that_no_model_can_be_built_of_is_one_line(folder, change, reason):
    edit_config(folder, **change)
    for build in (build_model, load_model):
        with pytest.raises(InputError) as error:
            build(folder)
        assert reason in message(error)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_the_file_system_refuses_is_one_line(tmp_path, name):
    for read in (check_checkpoint, load_tokenizer, load_model):
        with pytest.raises(InputError) as error:
            read(tmp_path / name)
        assert message(error).startswith("model folder ")


def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    """Root may read everything, so the refusal is the file system's answer made by hand."""

    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)
    for read in (check_checkpoint, load_tokenizer):
        with pytest.raises(InputError, match="Permission denied"):
            read(tmp_path)
