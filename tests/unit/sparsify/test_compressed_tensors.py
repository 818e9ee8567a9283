"""Folders of compressed-tensors: what stock transformers loads is the model that was quantised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from conf.options.export import ExportConfig
from conf.options.quantize import QuantizeConfig
from conf.options.run import RunConfig
from conf.schema import Config
from jobs.workers.checks import check_compressed
from jobs.workers.export import export_on_worker
from sparsify.errors import InputError
from sparsify.formats.kinds.compressed_tensors import check_fused, plan_of, write_compressed
from sparsify.models.load import load_model, quiet_transformers
from sparsify.packed.codes import unpack_codes
from sparsify.packed.folder import PackedFolder
from sparsify.packed.layer import pack_layer
from sparsify.packed.layout import Layer, Scheme
from sparsify.pattern import Pattern
from tests.conftest import message
from tests.quantized import packed_with
from tests.unit.sparsify.test_packed import CODED, coded, pruned, same_bits

TWO_FOUR = Pattern.parse("2:4")
WIDE = 10**6
"""a group size that is every layer's whole row"""

LAYOUTS = {
    "W4A16": Scheme("int", 4, 32), "W4A16 a row": Scheme("int", 4, WIDE),
    "W8A16": Scheme("int", 8, 64), "FP8": Scheme("fp8", activations="fp8"),
    "W8A8": Scheme("int", 8, WIDE, activations="int8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    """A packed folder of each layout in float32, and of some in bfloat16, and beside it the
    folder that is made of it."""
    found = {}
    for name, scheme in LAYOUTS.items():
        for dtype in ("float32", "bfloat16") if name in ("W4A16", "FP8") else ("float32",):
            folder = tmp_path_factory.mktemp("compressed")
            is_row = scheme.group_size == WIDE
            packed_with(folder / "packed", tiny_model_dir, scheme, dtype, per_row=is_row)
            plan, gate = write_compressed(folder / "written", folder / "packed")
            assert plan.label == name.split()[0] and gate["num_violations"] == 0
            assert gate["num_layers"] == 14
            found[f"{name} {dtype}"] = folder
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(48).view(2, 24) * 5 % 300).logits
    return found


@pytest.mark.parametrize("name", [f"{name} float32" for name in LAYOUTS])
def test_read_back_it_is_the_packed_model(folders: dict[str, Path], name: str) -> None:
    """Bit for bit in float32, which holds float16's scales."""
    folder = folders[name]
    ours, theirs = load_model(folder / "written"), load_model(folder / "packed")
    for (key, one), (_, other) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", ["W4A16 bfloat16", "FP8 bfloat16"])
def test_bfloat16_rounds_scales_alone(folders: dict[str, Path], name: str) -> None:
    ours = load_model(folders[name] / "written", "bfloat16").state_dict()
    theirs = load_model(folders[name] / "packed", "bfloat16").state_dict()
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    for key, other in theirs.items():  # half a step of the scale, and of either product
        assert torch.allclose(ours[key].float(), other.float(), rtol=2**-7, atol=0), key


@pytest.mark.parametrize("name", [
    *(f"{name} float32" for name in LAYOUTS), "W4A16 bfloat16", "FP8 bfloat16",
])  # fmt: skip
def test_stock_transformers_computes_the_same(folders: dict[str, Path], name: str) -> None:
    """With the library compressed-tensors: equal logits; where activations are rounded while the
    model runs, equal without that, and near with it."""
    pytest.importorskip("compressed_tensors", reason="of the dev dependencies")
    folder, dtype = folders[name] / "written", name.split()[-1]
    expected = logits(load_model(folder, dtype))
    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", quantization_config=CompressedTensorsConfig(dequantize=True)
        )
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(plain), expected)
    if "A16" in name:
        assert torch.equal(logits(loaded), expected)
    else:
        assert torch.allclose(logits(loaded), expected, atol=float(expected.abs().max()) * 0.05)


def test_layout_is_pinned(folders: dict[str, Path]) -> None:
    """One word, one scale and the configuration, worked out from the format's description."""
    folder = folders["W4A16 float32"]
    written = load_file(folder / "written/model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    packed = PackedFolder(folder / "packed")
    layer = packed.contents.layers[name]
    codes = unpack_codes(layer, packed.parts(name))
    word = 0
    for place, code in enumerate(codes.values_OI[3, 40:48].tolist()):
        word |= (code + 8) << 4 * place
    stored = written[f"{name}.weight_packed"]
    assert (stored.dtype, tuple(stored.shape)) == (torch.int32, (64, 16))
    assert int(stored[3, 5]) & 0xFFFFFFFF == word
    assert written[f"{name}.weight_shape"].tolist() == [64, 128]
    assert written[f"{name}.weight_scale"][3, 1] == codes.scales_OG[3, 1].float()
    assert not {f"{name}.weight", f"{name}.weight_indices"} & written.keys()
    found = json.loads((folder / "written/config.json").read_bytes())["quantization_config"]
    assert found["format"] == "pack-quantized" and found["ignore"] == ["lm_head"]
    assert found["quantization_status"] == "compressed" and "sparsity_config" not in found
    (group,) = found["config_groups"].values()
    assert group["weights"]["strategy"] == "group" and group["weights"]["group_size"] == 32
    assert group["input_activations"] is None and group["targets"] == ["Linear"]
    found = json.loads((folders["FP8 float32"] / "written/config.json").read_bytes())
    (group,) = found["quantization_config"]["config_groups"].values()
    assert found["quantization_config"]["format"] == "float-quantized"
    assert (
        group["input_activations"]["strategy"] == "token" and group["input_activations"]["dynamic"]
    )


@pytest.mark.parametrize("scheme", CODED)
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "unstructured:0.37"])
def test_codes_come_back_dense(scheme: Scheme, pattern: str) -> None:
    """Pruned places have the code that means exactly 0; kept ones what was packed."""
    parsed = Pattern.parse(pattern)
    _, keep = pruned(parsed, 7, 24, torch.float32)
    weight, codes = coded(scheme, keep, torch.float32)
    layer, parts = pack_layer("x", weight, keep, parsed, codes)
    found = unpack_codes(layer, parts)
    as_bytes = [t.view(torch.uint8)[keep] for t in (found.values_OI, codes.values_OI)]
    assert torch.equal(*as_bytes) and found.values_OI.dtype == codes.values_OI.dtype
    assert same_bits(found.scales_OG, codes.scales_OG)
    _, again = pack_layer("x", weight, keep, parsed, found)
    assert all(same_bits(again[name], part) for name, part in parts.items())
    if codes.zeros_OG is None and scheme.type != "nf4":
        assert not found.values_OI.float()[~keep].any()
    layer, parts = pack_layer("x", weight, keep, parsed)
    with pytest.raises(InputError, match="there are no codes"):
        unpack_codes(layer, parts)


def layers(**schemes: Scheme) -> dict[str, Layer]:
    return {name: Layer((64, 128), scheme, TWO_FOUR) for name, scheme in schemes.items()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (layers(x=Scheme("nf4", 4, 64)), "x is NF4"),
        (layers(x=Scheme("int", 4, 32, False)), "x has zero points"),
        (
            layers(x=Scheme("int", 4, 48)),
            r"x has groups of 48 for 128 columns.*use 32 or 64 or 128",
        ),
        (layers(x=Scheme("int", 4, 16)), "x has groups of 16"),
        (layers(x=Scheme("int", 4, 32), y=Scheme("int", 8, 32)), "x is int4-g32 and y int8-g32"),
        (layers(x=Scheme("int", 4, 32), y=Scheme("fp8")), "x is int4-g32 and y fp8"),
        (layers(x=Scheme()), "no layer is quantised; add quantize to stages"),
        ({"x": Layer((64, 172), Scheme("int", 4, 64), TWO_FOUR)}, "use one scale for each output"),
    ],
)
def test_what_stock_programs_do_not_read_is_refused(given: dict[str, Layer], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        plan_of(given)
    message(caught)


def test_layers_that_engines_fuse_are_quantised_together() -> None:
    linears = {f"m.{name}_proj" for name in ("q", "k", "v", "gate", "up", "down")}
    check_fused(linears, linears)
    check_fused({"m.gate_proj", "m.up_proj"}, linears)
    check_fused({"m.q_proj"}, {"m.q_proj", "m.o_proj"})
    with pytest.raises(InputError, match=r"m\.k_proj is quantised and m\.v_proj is not") as caught:
        check_fused(linears - {"m.v_proj"}, linears)
    message(caught)


def test_a_row_of_one_group_is_both(tmp_path: Path) -> None:
    """Groups of 128 on rows of 128 beside rows of 256: groups for all, a row being one of them."""
    given = {"x": Layer((8, 128), Scheme("int", 4, 128), TWO_FOUR),
             "y": Layer((8, 256), Scheme("int", 4, 128), TWO_FOUR)}  # fmt: skip
    assert plan_of(given).weights["strategy"] == "group"
    assert plan_of({"x": given["x"]}).weights["strategy"] == "channel"


def test_a_scale_of_nothing_and_one_too_small(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Groups without a weight get scale 1, for dividing by 0 is not for readers; and a scale that
    the model's dtype cannot hold is refused."""
    packed = packed_with(tmp_path / "packed", tiny_model_dir, Scheme("int", 4, 32), zero_rows=3)
    write_compressed(tmp_path / "written", packed)
    stored = load_file(tmp_path / "written/model.safetensors")
    scale = stored["model.layers.0.mlp.up_proj.weight_scale"]
    assert (scale[:3] == 1).all() and (scale[3:] != 1).all()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not load_model(tmp_path / "written").state_dict()[name][:3].any()
    packed = packed_with(tmp_path / "half", tiny_model_dir, Scheme("fp8"), "float16", factor=1e-4)
    with pytest.raises(InputError, match="a scale that float16 cannot hold") as caught:
        write_compressed(tmp_path / "refused", packed)
    message(caught)


def test_the_stage_writes_it_in_files_of_any_size(
    tmp_path: Path, folders: dict[str, Path], tiny_model_dir: Path
) -> None:
    packed = folders["W4A16 float32"] / "packed"
    config = replace(
        Config(),
        export=ExportConfig(formats=["compressed-tensors"], shard_size_gb=2e-5, max_timed_gb=0.0),
    )
    payload = {
        "config": config, "name": "recovered", "source": packed, "dense": tiny_model_dir,
        "folder": tmp_path, "results": [], "tasks": None, "quantized": None, "packed": None,
    }  # fmt: skip
    context: Any = SimpleNamespace(num_threads=1, device=torch.device("cpu"))
    found = export_on_worker(context, payload)
    (folder,) = tmp_path.iterdir()
    assert found["gate"].keys() == {folder.name} == {"compressed-w4a16"}
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "quantisation's speed only, not the sparsity's" in card and "W4A16" in card
    assert torch.equal(logits(load_model(folder)), logits(load_model(packed)))
    sparsity = json.loads((folder / "sparsity.json").read_bytes())
    assert len(sparsity["layers"]) == 14 and "lm_head.weight" in sparsity["model"]["dense"]


def models(dense: Path, **made: Path) -> Any:
    return SimpleNamespace(
        dense=dense, made={"quantize": made} if made else {}, sparse=lambda _: dense
    )


def test_the_stage_refuses_before_the_work(tmp_path: Path, tiny_model_dir: Path) -> None:
    """By the options alone where the model is to be quantised, else by what is there."""
    export = ExportConfig(formats=["compressed-tensors"])
    config = replace(Config(), export=export, stages=["prune", "quantize", "export"])
    check_compressed(
        replace(config, quantize=QuantizeConfig(group_size=32)), models(tiny_model_dir)
    )
    with pytest.raises(InputError, match="groups of 48 for 64 columns") as caught:
        check_compressed(
            replace(config, quantize=QuantizeConfig(group_size=48)), models(tiny_model_dir)
        )
    message(caught)
    config = replace(config, stages=["export"], run=RunConfig(from_="runs/earlier"))
    with pytest.raises(InputError, match="no layer is quantised; add quantize to stages"):
        check_compressed(config, models(tiny_model_dir))
    nf4 = packed_with(tmp_path / "nf4", tiny_model_dir, Scheme("nf4", 4, 64))
    with pytest.raises(InputError, match="is NF4"):
        check_compressed(config, models(tiny_model_dir, packed=nf4))
