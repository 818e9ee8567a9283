"""Exported folders: named, described and loaded by what is in them, written without a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparsify.formats.source
from conf.checks import FORMATS
from conf.options.export import ExportConfig
from conf.schema import Config
from jobs.workers.export import export_on_worker
from sparsify.errors import InputError
from sparsify.formats.kinds import get_format
from sparsify.formats.kinds.packed import save_packed_folder
from sparsify.formats.sparse_folder import MASKS, write_sparsity
from sparsify.formats.verify import masks_of
from sparsify.masks.storage import save_masks
from sparsify.models.load import load_model, load_pair
from sparsify.models.masked import apply_masks_, infer_masks
from sparsify.models.save import save_model
from sparsify.packed.folder import PackedFolder
from sparsify.pattern import Pattern
from sparsify.quantization import QuantParams, quantize_weight
from tests.conftest import message


@pytest.fixture(scope="module")
def sparse(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model, and beside it the same in integers of 4 and 8 bits, packed."""
    folder = tmp_path_factory.mktemp("sparse")
    model, tokenizer = load_pair(tiny_model_dir)
    pattern = Pattern.parse("2:4")
    masks = infer_masks(model, pattern, may_be_dense=True)
    apply_masks_(model, masks)
    source = folder / "model"
    save_model(model, tokenizer, source)
    save_masks(source / MASKS, masks)
    write_sparsity(source, masks, "2:4", "magnitude", {})
    for bits in (4, 8):
        rounded, quantized = load_model(source), {}
        for name, keep in masks.items():
            weight = rounded.get_submodule(name).weight.data
            params = QuantParams("rtn", f"int{bits}", 32)
            quantized[name] = quantize_weight(weight, keep, None, params, name)
            weight.copy_(quantized[name].weight_OI)
        save_packed_folder(
            folder / f"int{bits}", rounded, tokenizer, masks, pattern, quantized, source
        )
    return folder


def export(
    source: Path, dense: Path, to: Path, packed: Path | None = None, **options: Any
) -> dict[str, Any]:
    config = replace(Config(), export=ExportConfig(**{"max_timed_gb": 0.0, **options}))
    payload = {
        "config": config, "name": "recovered", "source": source, "dense": dense, "folder": to,
        "results": [], "packed": packed, "tasks": None, "quantized": None,
    }  # fmt: skip
    context: Any = SimpleNamespace(num_threads=1, device=torch.device("cpu"))
    return export_on_worker(context, payload)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in folder.glob("model*.safetensors") for n, t in load_file(p).items()}


@pytest.mark.parametrize("bits", [4, 8, None])
def test_the_quantised_folder_is_named_by_its_bits(
    sparse: Path, tiny_model_dir: Path, tmp_path: Path, bits: int | None
) -> None:
    quantized = None if bits is None else sparse / f"int{bits}"
    max_gb = 4.0 if bits == 4 else 0.0
    found = export(sparse / "model", tiny_model_dir, tmp_path, quantized, max_timed_gb=max_gb)
    assert (found["speed"] is not None) == (bits == 4)
    folders = {path.name for path in tmp_path.iterdir()}
    expected = {"sparse", "sparse-packed"} | ({f"int{bits}-packed"} if bits else set())
    assert folders == expected == found["gate"].keys()
    size = sum(
        path.stat().st_size for path in (tmp_path / "sparse-packed").glob("model*.safetensors")
    )
    assert found["packed_bytes"] == {"recovered": size}
    assert {gate["num_violations"] for gate in found["gate"].values()} == {0}
    for folder in folders:
        card = (tmp_path / folder / "README.md").read_text(encoding="utf-8")
        assert ("INT" in card) == folder.startswith("int")
        assert f'AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")' in card
        assert ("import sparsify.integrations" in card) == folder.endswith("-packed")
        if folder.startswith("int"):
            assert f"in INT{bits}, only the kept values" in card


@pytest.mark.parametrize("name", FORMATS)
def test_one_format_alone(sparse: Path, tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    assert get_format(name).name == name
    is_quantized = name == "compressed-tensors"
    quantized = sparse / "int4" if is_quantized else None
    export(sparse / "model", tiny_model_dir, tmp_path, quantized, formats=[name])
    (folder,) = tmp_path.iterdir()
    assert (folder / "sparsity.json").is_file()
    expected = load_model(quantized or sparse / "model")
    for ours, theirs in zip(load_model(folder).parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_formats_that_there_are_not_are_refused_with_the_list() -> None:
    with pytest.raises(
        InputError, match=r"formats=pakced: .*one of: compressed-tensors, dense, packed"
    ) as caught:
        ExportConfig(formats=["pakced"])
    message(caught)
    with pytest.raises(InputError, match=r"export\.formats=\[\]: .*dense, packed"):
        ExportConfig(formats=[])
    with pytest.raises(InputError, match=r"export\.shard_size_gb"):
        ExportConfig(shard_size_gb=0)


def test_nothing_holds_the_model(
    sparse: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is loaded, whatever is read; and files are as small as asked for."""

    def loads(*_: Any) -> None:
        raise AssertionError("a whole model was loaded")

    monkeypatch.setattr(sparsify.formats.source, "load_model", loads)
    export(sparse / "model", tiny_model_dir, tmp_path / "one", sparse / "int4")
    export(sparse / "model", tiny_model_dir, tmp_path / "many", sparse / "int4", shard_size_gb=5e-5)
    for name in ("sparse", "sparse-packed", "int4-packed"):
        one, many = weights(tmp_path / "one" / name), weights(tmp_path / "many" / name)
        assert len(list((tmp_path / "many" / name).glob("model-*.safetensors"))) > 2
        assert one.keys() == many.keys()
        assert all(torch.equal(one[key], many[key]) for key in one)
        for path in (tmp_path / "many" / name).glob("model-*.safetensors"):
            shard = load_file(path)
            layers = {key.partition(".weight")[0] for key in shard}
            assert sum(t.nbytes for t in shard.values()) <= 5e4 or len(layers) == 1
        assert torch.equal(
            load_model(tmp_path / "many" / name).lm_head.weight, one["lm_head.weight"]
        )


def test_weights_are_cast(sparse: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    found = export(sparse / "model", tiny_model_dir, tmp_path, dtype="bfloat16")
    assert found["dtype"] == "bfloat16"
    expected = load_model(sparse / "model", "bfloat16").state_dict()
    assert {t.dtype for t in weights(tmp_path / "sparse").values()} == {torch.bfloat16}
    for name in ("sparse", "sparse-packed"):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
        again = load_model(tmp_path / name, "bfloat16").state_dict()
        assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_a_packed_folder_is_exported_again(
    sparse: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """From its own positions and values: the dense folder, and the same bytes packed."""
    export(sparse / "model", tiny_model_dir, tmp_path / "one")
    first = tmp_path / "one/sparse-packed"
    export(first, tiny_model_dir, tmp_path / "two")
    again = tmp_path / "two/sparse-packed"
    names = [path.name for path in again.iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors.index.json"} <= set(names)
    for name in names:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    one, two = weights(tmp_path / "one/sparse"), weights(tmp_path / "two/sparse")
    assert all(torch.equal(one[key], two[key]) for key in one)
    ours, pattern = masks_of(first)
    theirs, _ = masks_of(sparse / "model")
    assert str(pattern) == "2:4" and list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_that_was_pruned_elsewhere(
    sparse: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Its masks are its zeros; where they are not 2:4 the layer, row and group are named."""
    model, tokenizer = load_pair(sparse / "model")
    save_model(model, tokenizer, tmp_path / "foreign")
    export(tmp_path / "foreign", tiny_model_dir, tmp_path / "out")
    packed = PackedFolder(tmp_path / "out/sparse-packed")
    assert len(packed.contents.layers) == 14
    model.model.layers[1].mlp.up_proj.weight.data[5, 8:12] = 1
    save_model(model, tokenizer, tmp_path / "foreign")
    said = r"model\.layers\.1\.mlp\.up_proj: not pruned to 2:4 .*row 5, group 2, from column 8"
    with pytest.raises(InputError, match=said) as caught:
        export(tmp_path / "foreign", tiny_model_dir, tmp_path / "refused")
    message(caught)


def test_values_that_are_no_numbers_are_refused(
    sparse: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_pair(sparse / "model")
    model.lm_head.weight.data[3, 3] = float("nan")
    save_model(model, tokenizer, tmp_path / "bad")
    with pytest.raises(InputError, match=r"1 of \d+ values of lm_head\.weight are NaN"):
        export(tmp_path / "bad", tiny_model_dir, tmp_path / "out")
