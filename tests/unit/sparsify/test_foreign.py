"""Checkpoints of compressed-tensors, written here from the formats' descriptions, are read."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.options.export import ExportConfig
from conf.schema import Config
from jobs.workers.export import export_on_worker
from sparsify.errors import InputError
from sparsify.formats.kinds.compressed_tensors import write_compressed
from sparsify.formats.source import masks_of_source, open_source
from sparsify.models.blocks import open_stored
from sparsify.models.foreign._base import Args, Part
from sparsify.models.foreign.marlin_24 import READER as MARLIN
from sparsify.models.load import check_checkpoint, load_model, open_encoded, read_config
from sparsify.packed.layout import Scheme
from tests.conftest import message
from tests.quantized import packed_with

GROUP_4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
CHANNEL_8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT_8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
PAIRS = tuple(itertools.combinations(range(4), 2))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A Llama of one block whose layers marlin-24 can hold: multiples of 64 outputs, 32 inputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=320,
            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
            bos_token_id=None, eos_token_id=0, tie_word_embeddings=False,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("foreign") / "llama"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def layers_of(tensors: dict[str, Tensor]) -> list[str]:
    return [n.removesuffix(".weight") for n in tensors if "_proj" in n]


def numbers(shape: tuple[int, int], bits: int, offset: int = 0) -> np.ndarray:
    """Codes without a random generator, so that they are the same for ever."""
    row, column = np.indices(shape)
    return (row * 37 + column * 101 + row * column * 7 + offset) % 2**bits - 2 ** (bits - 1)


def kept_columns(shape: tuple[int, int], offset: int = 0) -> np.ndarray:
    """(O, I / 2): two columns of every four."""
    row, group = np.indices((shape[0], shape[1] // 4))
    pairs = np.array(PAIRS)[(row * 5 + group * 3 + offset) % 6]
    return (pairs + 4 * group[..., None]).reshape(shape[0], shape[1] // 2)


def scales_of(shape: tuple[int, int], num_groups: int) -> np.ndarray:
    row, group = np.indices((shape[0], num_groups))
    return (((row * 13 + group * 29) % 1000 + 1) / 4096).astype(np.float16)


def dense_of(kept: np.ndarray, columns: np.ndarray, scales: np.ndarray, width: int) -> np.ndarray:
    """The weight, in float64: codes (O, K) at their columns times their groups' scales."""
    weight = np.zeros((len(kept), width))
    size = width // scales.shape[1]
    for row in range(len(kept)):
        weight[row, columns[row]] = kept[row] * scales[row, columns[row] // size].astype(np.float64)
    return weight


def marlin_24(
    kept: np.ndarray, columns: np.ndarray, scales: np.ndarray, bits: int
) -> dict[str, Tensor]:
    """The three tensors of a layer, number by number.

    Args:
        kept: (O, K) codes of the kept weights.
        columns: (O, K) of each.
        scales: (O, G) float16.
        bits: of a code.
    """
    num_rows, num_kept = kept.shape
    order = []
    for thread in range(32):
        for j in range(4):
            for half in range(2):
                for row in (0, 1, 8, 9):
                    row += 2 * (thread % 4)
                    order.append(
                        16 * row + 256 * (thread // 8) + 8 * (thread // 4 % 2) + 4 * half + j
                    )
    mixed = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    order = [order[start + i] for start in range(0, 1024, len(mixed)) for i in mixed]
    matrix = kept.T + 2 ** (bits - 1)
    words = []
    for top in range(0, num_kept, 16):
        line = [
            int(matrix[top + row, left + column])
            for left in range(0, num_rows, 16) for row in range(16) for column in range(16)
        ]  # fmt: skip
        line = [line[start + i] for start in range(0, len(line), 1024) for i in order]
        per_word = 32 // bits
        words.append(
            [sum(line[k + i] << bits * i for i in range(per_word))
             for k in range(0, len(line), per_word)]
        )  # fmt: skip
    packed = np.array(words, np.uint32).view(np.int32)

    num_words = num_kept // 8
    meta = np.zeros(num_rows * num_words, np.uint16)
    for row in range(num_rows):
        for word in range(num_words):
            value = 0
            for i, column in enumerate(columns[row, 8 * word : 8 * word + 8]):
                value |= int(column % 4) << 2 * i
            to = 64 * (row // 64) + 2 * (row % 2) + (row % 8) // 4
            to += 32 * ((row % 4) // 2) + 4 * ((row % 64) // 8)
            at = word
            if to % 2 == 0 and at % 2 == 1:
                to, at = to + 1, at - 1
            elif to % 2 == 1 and at % 2 == 0:
                to, at = to - 1, at + 1
            meta[at // 2 * num_rows * 2 + to * 2 + at % 2] = value

    stored = np.ascontiguousarray(scales.T)
    if scales.shape[1] > 1 and num_kept * 2 // scales.shape[1] < num_kept:
        turned = [8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)]
        stored = stored.reshape(-1, 64)[:, turned].reshape(stored.shape)
    return {
        "weight_packed": torch.from_numpy(packed),
        "meta": torch.from_numpy(meta.view(np.int16).reshape(num_words // 2, num_rows * 2)),
        "scale_packed": torch.from_numpy(np.ascontiguousarray(stored)),
    }


def bitmask(weight: np.ndarray, keep: np.ndarray) -> dict[str, Tensor]:
    """sparse-24-bitmask, number by number."""
    num_rows, num_columns = weight.shape
    bits = np.zeros((num_rows, -(-num_columns // 8)), np.uint8)
    for row, column in zip(*np.nonzero(keep), strict=True):
        bits[row, column // 8] |= 1 << column % 8
    values = weight[keep].reshape(num_rows, -1).astype(np.float32)
    return {
        "compressed": torch.from_numpy(values), "bitmask": torch.from_numpy(bits),
        "shape": torch.tensor([[num_rows], [num_columns]]),
    }  # fmt: skip


def write(folder: Path, base: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A checkpoint like `base` with these tensors, and these keys in config.json."""
    shutil.copytree(base, folder)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | config))
    return folder


def quantization(kind: str, weights: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}} if weights else {}
    return {
        "quant_method": "compressed-tensors", "format": kind, "config_groups": groups,
        "ignore": ["lm_head"], "quantization_status": "compressed", **more,
    }  # fmt: skip


def sparsity(kind: str) -> dict[str, Any]:
    return {
        "format": kind, "global_sparsity": 0.37, "registry_requires_subclass": False,
        "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"],
    }  # fmt: skip


def checkpoint(folder: Path, llama: Path, kind: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint of a format, and its layers' weights in float64."""
    tensors = load_file(llama / "model.safetensors")
    expected = {}
    for place, layer in enumerate(layers_of(tensors)):
        shape: Any = tuple(tensors.pop(f"{layer}.weight").shape)
        columns = kept_columns(shape, place)
        if kind.startswith("marlin"):
            bits = int(kind[-1])
            scales = scales_of(shape, 5 if shape[1] == 320 else 1)
            kept = np.take_along_axis(numbers(shape, bits, place), columns, 1)
            parts = marlin_24(kept, columns, scales, bits)
            expected[layer] = dense_of(kept, columns, scales, shape[1])
        else:
            keep = np.zeros(shape, bool)
            np.put_along_axis(keep, columns, True, 1)
            expected[layer] = np.where(keep, (numbers(shape, 8, place) + 0.5) / 512, 0)
            parts = bitmask(expected[layer], keep)
        tensors.update({f"{layer}.{name}": tensor for name, tensor in parts.items()})
    if kind.startswith("marlin"):
        weights = {**GROUP_4, "num_bits": int(kind[-1]), "group_size": 64}
        # one group a row in all but one of the layers, which the format has as a channel
        groups = {
            "group_0": {"targets": ["re:.*down_proj"], "weights": weights},
            "group_1": {"targets": ["Linear"],
                        "weights": {**CHANNEL_8, "num_bits": int(kind[-1])}},
        }  # fmt: skip
        config = {"quantization_config": quantization("marlin-24", None, config_groups=groups)}
    elif kind == "old place":
        config = {"sparsity_config": sparsity("sparse-24-bitmask")}
    elif kind == "older place":
        found = {"quant_method": "sparseml", "format": "dense"}
        config = {"compression_config": {**found, "sparsity_config": sparsity("sparse-24-bitmask")}}
    else:
        found = quantization("dense", None, sparsity_config=sparsity("sparse-24-bitmask"))
        config = {"quantization_config": found}
    return write(folder, llama, tensors, **config), expected


@pytest.mark.parametrize("kind", ["marlin 4", "marlin 8", "new place", "old place", "older place"])
def test_formats_that_nothing_else_reads(tmp_path: Path, llama: Path, kind: str) -> None:
    folder, expected = checkpoint(tmp_path / "model", llama, kind)
    check_checkpoint(folder)
    model = load_model(folder)
    for layer, weight in expected.items():
        found = model.get_submodule(layer).weight
        assert torch.equal(found, torch.from_numpy(weight).float()), layer
    rest = load_file(llama / "model.safetensors")
    assert torch.equal(model.lm_head.weight, rest["lm_head.weight"])
    config = read_config(folder)
    assert not any(hasattr(config, key) for key in ("quantization_config", "sparsity_config"))

    _, stored, reason = open_stored(folder, "bfloat16")  # as a walk over blocks reads it
    assert reason is None
    for layer, weight in expected.items():
        found = stored.places[f"{layer}.weight"].read(torch.bfloat16)
        assert torch.equal(found, torch.from_numpy(weight).float().bfloat16())
    source = open_source(folder, None)
    masks, pattern = masks_of_source(source, "2:4")
    assert str(pattern) == "2:4" and len(masks) == 7
    assert source.tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.float32


@pytest.mark.parametrize("place", ["quantization_config", "sparsity_config", "compression_config"])
def test_dense_storage_with_a_note_on_its_zeros(tmp_path: Path, llama: Path, place: str) -> None:
    """As the Sparse-Llama family of 2024 was published: its weights are dense tensors."""
    note = sparsity("dense")
    if place == "quantization_config":
        note = quantization("dense", None, sparsity_config=note)
    elif place == "compression_config":
        note = {"sparsity_config": note}
    tensors = load_file(llama / "model.safetensors")
    folder = write(tmp_path / "model", llama, tensors, **{place: note})
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    encoded = open_encoded(folder)
    assert encoded is not None and not hasattr(read_config(folder), place)


def test_marlin_24_is_what_its_last_writer_wrote() -> None:
    """The hand-written encoder of these tests against compressed-tensors 0.14.0.1, by digests of
    the tensors that this wrote for the same codes and scales."""
    wrote = {
        (4, 64, 256, 2): "53862c4f747ec5c4", (4, 128, 512, 4): "c5e1103fd1601934",
        (4, 64, 64, 1): "83f4925a5d7d2a01", (8, 64, 512, 4): "17bc06a7e72652e5",
        (8, 192, 96, 1): "8d20a7b59e1c5255",
    }  # fmt: skip
    for (bits, num_rows, num_columns, num_groups), digest in wrote.items():
        shape = num_rows, num_columns
        columns = kept_columns(shape)
        kept = np.take_along_axis(numbers(shape, bits), columns, 1)
        kept[kept == 0] = 1  # that writer saw no difference between such a code and a pruned one
        parts = marlin_24(kept, columns, scales_of(shape, num_groups), bits)
        found = hashlib.sha256()
        for name in ("weight_packed", "scale_packed", "meta"):
            found.update(parts[name].contiguous().numpy().tobytes())
        assert found.hexdigest()[:16] == digest, (bits, shape)


def test_marlin_24_has_short_groups_in_another_order(tmp_path: Path) -> None:
    """Scales of groups that are shorter than the kept values of a row are permuted, others not."""
    for num_columns, num_groups in ((256, 2), (512, 4), (512, 1)):
        shape = 64, num_columns
        columns = kept_columns(shape)
        kept = np.take_along_axis(numbers(shape, 4), columns, 1)
        scales = scales_of(shape, num_groups)
        path = tmp_path / f"{num_columns}-{num_groups}.safetensors"
        save_file(marlin_24(kept, columns, scales, 4), path)
        kinds = {"weight_packed": "I32", "scale_packed": "F16", "meta": "I16"}
        stored = load_file(path)
        parts = {n: Part(path, n, kind, tuple(stored[n].shape)) for n, kind in kinds.items()}
        args = Args(4, "int", True, "group", num_columns // num_groups)
        assert MARLIN.shape(parts, args) == shape
        expected = dense_of(kept, columns, scales, num_columns)
        found = MARLIN.decode(parts, args, shape)
        assert torch.equal(found, torch.from_numpy(expected).float())


@pytest.mark.parametrize("kind", ["pack", "asymmetric", "reordered", "int", "float", "both"])
def test_quantised_formats(tmp_path: Path, llama: Path, kind: str) -> None:
    """Of whoever wrote them: packed words, plain codes, and codes of the kept weights alone."""
    tensors = load_file(llama / "model.safetensors")
    expected, args, name = {}, dict(GROUP_4), "pack-quantized"
    for place, layer in enumerate(layers_of(tensors)):
        shape: Any = tuple(tensors.pop(f"{layer}.weight").shape)
        num_rows, num_columns = shape
        codes = numbers(shape, 4, place)
        if kind in ("pack", "asymmetric", "reordered"):
            scales = scales_of(shape, num_columns // 16)
            group = np.arange(num_columns) // 16
            zeros = np.zeros(scales.shape, int)
            if kind == "asymmetric":
                args["symmetric"] = False
                zeros = numbers(scales.shape, 4, 5)
            if kind == "reordered":
                group = group[::-1].copy()
            unsigned = (codes + 8).astype(np.uint32).reshape(num_rows, -1, 8)
            words = sum(unsigned[..., i] << np.uint32(4 * i) for i in range(8)).view(np.int32)
            parts = {
                "weight_packed": torch.from_numpy(words),
                "weight_scale": torch.from_numpy(scales),
                "weight_shape": torch.tensor(shape),
            }
            if kind == "asymmetric":
                down = (zeros + 8).astype(np.uint32).reshape(num_rows // 8, 8, -1)
                words = sum(down[:, i] << np.uint32(4 * i) for i in range(8)).view(np.int32)
                parts["weight_zero_point"] = torch.from_numpy(words)
            if kind == "reordered":
                parts["weight_g_idx"] = torch.from_numpy(group.astype(np.int32))
            weight = (codes - zeros[:, group]) * scales[:, group].astype(np.float64)
        else:
            scales = scales_of(shape, 1)
            args, name = (
                (CHANNEL_8, "int-quantized") if kind == "int" else (FLOAT_8, "float-quantized")
            )
            stored = torch.from_numpy(codes).to(
                torch.int8 if kind == "int" else torch.float8_e4m3fn
            )
            parts = {"weight": stored}
            if kind == "both":
                keep = np.zeros(shape, bool)
                np.put_along_axis(keep, kept_columns(shape, place), True, 1)
                codes = np.where(keep, codes, 0)
                parts = bitmask(codes, keep)
                parts["compressed"] = parts["compressed"].to(torch.float8_e4m3fn)
            parts["weight_scale"] = torch.from_numpy(scales)
            weight = codes * scales.astype(np.float64)
        tensors.update({f"{layer}.{part}": tensor for part, tensor in parts.items()})
        expected[layer] = weight
    more = {"sparsity_config": sparsity("sparse-24-bitmask")} if kind == "both" else {}
    config = quantization(name, args, **more)
    folder = write(tmp_path / "model", llama, tensors, quantization_config=config)
    model = load_model(folder)
    for layer, weight in expected.items():
        found = model.get_submodule(layer).weight
        assert torch.equal(found, torch.from_numpy(weight).float()), layer


DAMAGES = {
    "marlin 4": {
        "meta lost": ("meta", None, "meta is missing"),
        "meta says one column twice": ("meta", lambda t: torch.zeros_like(t),
                                       r"meta: row 0, group 0 has the places \[0, 0\]"),
        "scales of another layer": ("scale_packed", lambda t: t[:, :-1], "scale_packed is"),
        "words lost": ("weight_packed", lambda t: t[:, :-1], "weight_packed is"),
        "of another type": ("weight_packed", lambda t: t.long(), "weight_packed is"),
    },
    "new place": {
        "bits lost": ("bitmask", lambda t: t & 127, "bitmask has .* bits set for"),
        "bits moved": ("bitmask", lambda t: torch.cat((t[:1] ^ 255, t[1:])), None),
        "a row of bits moved": ("bitmask", lambda t: torch.cat((t[:1] | 15, t[1:2] & 240, t[2:])),
                                "bitmask"),
        "values lost": ("compressed", lambda t: t[:-1], "compressed is"),
        "another shape": ("shape", lambda t: t + 8, "bitmask is"),
        "no shape": ("shape", lambda t: t[:1], "shape is"),
        "a shape of nothing": ("shape", lambda t: -t, "shape says the shape -"),
        "values gone": ("compressed", None, "compressed is missing"),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "damage"), [(kind, name) for kind, known in DAMAGES.items() for name in known]
)
def test_damage_is_named(tmp_path: Path, llama: Path, kind: str, damage: str) -> None:
    part, change, said = DAMAGES[kind][damage]
    folder, expected = checkpoint(tmp_path / "model", llama, kind)
    tensors = load_file(folder / "model.safetensors")
    layer = sorted(expected)[3]
    changed = tensors.pop(f"{layer}.{part}")
    if change is not None:
        tensors[f"{layer}.{part}"] = change(changed).contiguous()
    save_file(tensors, folder / "model.safetensors")
    if said is None:  # half of the bits are set, in other places: nobody can know
        load_model(folder)
        return
    with pytest.raises(InputError, match=rf"{layer}\.{said}") as caught:
        load_model(folder)
    message(caught)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (quantization("nvfp4-pack-quantized", GROUP_4), "format 'nvfp4-pack-quantized' cannot"),
        (quantization("int-quantized", {**CHANNEL_8, "strategy": "block"}), "strategy block"),
        (quantization("pack-quantized", {**GROUP_4, "num_bits": 3}), "int of 3 bits"),
        (quantization("pack-quantized", {**GROUP_4, "group_size": None}), "group_size None"),
        (quantization("pack-quantized", {"type": "int"}), "'num_bits'"),
        (quantization("dense", None, transform_config={"config_groups": {"a": {}}}), "transform"),
        ({"quant_method": "gptq", "bits": 4}, r"weights are quantised \(quantization_config\)"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, llama: Path, config: dict[str, Any], said: str
) -> None:
    tensors = load_file(llama / "model.safetensors")
    folder = write(tmp_path / "model", llama, tensors, quantization_config=config)
    with pytest.raises(InputError, match=said) as caught:
        check_checkpoint(folder)
    message(caught)


def test_codes_without_scales_or_a_group_are_refused(tmp_path: Path, llama: Path) -> None:
    packed = packed_with(tmp_path / "packed", llama, Scheme("fp8"))
    write_compressed(tmp_path / "fp8", packed)
    path = tmp_path / "fp8/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != f"{name}_scale"}, path)
    with pytest.raises(InputError, match=rf"{name} is of F8_E4M3 and has no scales"):
        check_checkpoint(tmp_path / "fp8")
    save_file(tensors, path)
    check_checkpoint(tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8/config.json").read_bytes())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:.*down_proj"]
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no group of config_groups is of this layer") as caught:
        check_checkpoint(tmp_path / "fp8")
    message(caught)


@pytest.mark.parametrize("kind", ["marlin 4", "old place"])
def test_an_orphaned_checkpoint_is_exported(tmp_path: Path, llama: Path, kind: str) -> None:
    """To the packed format and to dense tensors, by the stage itself; nothing of the old format is
    left in config.json."""
    folder, expected = checkpoint(tmp_path / "model", llama, kind)
    config = replace(Config(), export=ExportConfig(["dense", "packed"], max_timed_gb=0.0))
    payload = {
        "config": config, "name": "given", "source": folder, "dense": llama, "results": [],
        "folder": tmp_path / "out", "tasks": None, "quantized": None, "packed": None,
    }  # fmt: skip
    context: Any = SimpleNamespace(num_threads=1, device=torch.device("cpu"))
    found = export_on_worker(context, payload)
    assert {gate["num_violations"] for gate in found["gate"].values()} == {0}
    for name in ("sparse", "sparse-packed"):
        model = load_model(tmp_path / "out" / name)
        for layer, weight in expected.items():
            written = model.get_submodule(layer).weight
            assert torch.equal(written, torch.from_numpy(weight).float()), (name, layer)
        said = json.loads((tmp_path / "out" / name / "config.json").read_bytes())
        assert "sparsity_config" not in said
        assert said.get("quantization_config", {}).get("quant_method", "twofour") == "twofour"
