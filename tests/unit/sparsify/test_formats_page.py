"""docs/formats.md is enough: a reader of numpy and json, written from it alone, reads a folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.packed.layer import pack_layer
from sparsify.packed.layout import Contents, Scheme
from sparsify.packed.writer import PackedWriter
from sparsify.pattern import Pattern
from tests.conftest import REPOSITORY
from tests.unit.sparsify.test_packed import coded, pruned

PAGE = (REPOSITORY / "docs/formats.md").read_text(encoding="utf-8")

# ---- the reader: nothing of this project is used down to the next line of dashes ----


def page_table() -> np.ndarray:
    block = re.search(r"table of nf4.*?```\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    return np.array([float(word) for word in block[1].split()], np.float32)


def stored(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file; BF16 and F8_E4M3 as the float32 that they stand for."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, entry in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        raw = content[start + first : start + last]
        kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1", "F8_E4M3": "u1"}
        array = np.frombuffer(raw, kinds[entry["dtype"]])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        if entry["dtype"] == "F8_E4M3":
            array = e4m3(array)
        found[name] = array.reshape(entry["shape"])
    return found


def e4m3(bits: np.ndarray) -> np.ndarray:
    """Sign, four bits of exponent with bias 7, three of mantissa; no infinity."""
    sign = np.where(bits & 0x80, -1.0, 1.0)
    exponent, mantissa = (bits >> 3 & 15).astype(int), (bits & 7) / 8
    value = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    return (sign * value).astype(np.float32)


def numbers(row: np.ndarray, width: int, count: int) -> list[int]:
    """Numbers of `width` bits from the lowest bit of the first byte up."""
    whole = int.from_bytes(row.tobytes(), "little")
    return [whole >> (width * place) & (2**width - 1) for place in range(count)]


def dense(folder: Path) -> dict[str, np.ndarray]:
    """Every packed layer's weight in float32, by the page."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "twofour" and config["version"] == 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: stored(folder / name) for name in set(index["weight_map"].values())}

    def tensor(name: str) -> np.ndarray:
        return files[index["weight_map"][name]][name]

    return {
        name: layer(name, entry, config["schemes"][entry["scheme"]], config["pattern"], tensor)
        for name, entry in config["layers"].items()
    }


def layer(name: str, entry: dict, scheme: dict, pattern: str, tensor: Any) -> np.ndarray:
    rows, columns = entry["shape"]
    weight = np.zeros((rows, columns), np.float32)
    places: list[list[int]]
    if pattern.startswith("unstructured"):
        bitmask = tensor(f"{name}.weight_bitmask")
        places = [
            [i for i in range(columns) if bitmask[row, i // 8] >> (i % 8) & 1]
            for row in range(rows)
        ]
        flat = codes_of(tensor(f"{name}.weight"), scheme, sum(map(len, places)))
        values = np.split(flat, np.cumsum([len(place) for place in places])[:-1])
    else:
        n, m = map(int, pattern.split(":"))
        kept = columns // m * n
        width = math.ceil(math.log2(m))
        indices = tensor(f"{name}.weight_indices")
        places = [
            [m * (k // n) + at for k, at in enumerate(numbers(indices[row], width, kept))]
            for row in range(rows)
        ]
        values = [codes_of(tensor(f"{name}.weight")[row], scheme, kept) for row in range(rows)]
    for row in range(rows):
        for column, value in zip(places[row], values[row], strict=True):
            weight[row, column] = meaning(name, row, column, value, scheme, tensor)
    return weight


def codes_of(row: np.ndarray, scheme: dict, count: int) -> np.ndarray:
    if scheme.get("bits") != 4:
        return row
    pairs = np.array([half for byte in row for half in (int(byte) & 15, int(byte) >> 4)])[:count]
    return pairs - 8 if scheme["type"] == "int" and scheme["symmetric"] else pairs


def meaning(name: str, row: int, column: int, value: Any, scheme: dict, tensor: Any) -> np.float32:
    if scheme["type"] == "float":
        return np.float32(value)
    if scheme["type"] == "fp8":
        return np.float32(value) * tensor(f"{name}.weight_scales")[row, 0] + np.float32(0)
    group = column // scheme["group_size"]
    scale = np.float32(tensor(f"{name}.weight_scales")[row, group])
    if scheme["type"] == "nf4":
        return page_table()[value] * scale + np.float32(0)
    zero = 0 if scheme["symmetric"] else int(tensor(f"{name}.weight_zeros")[row, group])
    return np.float32(int(value) - zero) * scale + np.float32(0)


# -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "unstructured:0.5"])
def test_a_reader_from_the_page_alone_reads_every_type(tmp_path, pattern):
    parsed = Pattern.parse(pattern)
    layers, expected, writer = {}, {}, PackedWriter(tmp_path, 900)
    schemes = [
        *(None, None, None), Scheme("int", 4, 16), Scheme("int", 8, 7), Scheme("int", 4, 20, False),
        Scheme("int", 8, 40, False), Scheme("nf4", 4, 16), Scheme("fp8"),
    ]  # fmt: skip
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    for number, scheme in enumerate(schemes):
        name, codes = f"layers.{number}.up", None
        weight, keep = pruned(parsed, 5, 40, dtypes[min(number, 2)], seed=number)
        if scheme is not None:
            weight, codes = coded(scheme, keep, torch.float32, seed=number)
        layers[name], parts = pack_layer(name, weight, keep, parsed, codes)
        writer.add({f"{name}.{part}": tensor for part, tensor in parts.items()})
        expected[name] = weight.float().numpy()
    config = Contents(parsed, layers).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    writer.finish(config)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    found = dense(tmp_path)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert np.array_equal(found[name], weight), name
        assert np.array_equal(np.signbit(found[name]), np.signbit(weight)), name


def test_the_index_is_what_the_page_says(tmp_path):
    """Sizes and hashes, taken again as the page describes them."""
    weight, keep = pruned(Pattern.parse("2:4"), 5, 40, torch.float32)
    layer, parts = pack_layer("x", weight, keep, Pattern.parse("2:4"))
    writer = PackedWriter(tmp_path, 10**9)
    writer.add({f"x.{part}": tensor for part, tensor in parts.items()})
    config = Contents(Pattern.parse("2:4"), {"x": layer}).to_dict()
    writer.finish(config)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    ((name, file),) = index["files"].items()
    content = (tmp_path / name).read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    assert file == {
        "num_bytes": len(content), "header_bytes": head,
        "header_sha256": hashlib.sha256(content[:head]).hexdigest(),
    }  # fmt: skip
    for tensor, entry in json.loads(content[8:head]).items():
        if tensor != "__metadata__":
            first, last = entry["data_offsets"]
            body = content[head + first : head + last]
            told = {"num_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
            assert index["tensors"][tensor] == told

    def digest(value: Any) -> str:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    metadata = index["metadata"]
    assert metadata["total_size"] == sum(e["num_bytes"] for e in index["tensors"].values())
    assert metadata["quantization_config_sha256"] == digest(config)
    own = metadata.pop("sha256")
    assert own == digest(index)


def test_the_page_shows_a_configuration_that_is_read():
    (text,) = re.findall(r"## quantization_config\n\n```json\n(.*?)```", PAGE, re.DOTALL)
    found = Contents.from_dict(json.loads(text), "the page")
    assert found.layers["model.layers.0.self_attn.q_proj"].scheme == Scheme("int", 4, 128)
