"""Packed folders in transformers, by one import: the same answers from the packed tensors alone."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from jobs.benchmarks.support.families import random_family
from sparsify.errors import InputError
from sparsify.formats.kinds.packed import save_packed_folder
from sparsify.formats.source import Source
from sparsify.formats.verify import masks_of
from sparsify.integrations.dense import DenseLinear
from sparsify.integrations.linear import PackedLinear
from sparsify.integrations.quantizer import check_fits
from sparsify.kernels import packed_linear as kernel
from sparsify.kernels.cpu import linear as cpu
from sparsify.kernels.cpu.library import library, use_folder
from sparsify.masks.select import keep_mask_from_scores
from sparsify.models.blocks import BlocksOnDisk, reason_to_hold_whole, stored_of
from sparsify.models.load import check_checkpoint, load_model, load_tokenizer
from sparsify.models.masked import apply_masks_, infer_masks
from sparsify.models.save import save_model
from sparsify.models.unfuse import unfuse_experts
from sparsify.packed.folder import INDEX, PackedFolder, write_index
from sparsify.packed.layer import pack_layer
from sparsify.packed.layout import Layer, Scheme, packed_layers
from sparsify.pattern import Pattern
from sparsify.quantization import QuantParams, quantize_weight
from tests.conftest import REPOSITORY, message
from tests.unit.sparsify.test_packed import coded

TWO_FOUR = Pattern.parse("2:4")


@pytest.fixture(autouse=True)
def _bits_of_the_dense_model(monkeypatch):
    """PyTorch on the CPU, for tests that compare bits; those of the kernels ask for `kernels`."""
    monkeypatch.setattr(PackedLinear, "uses_kernels", False)


@pytest.fixture
def kernels(_bits_of_the_dense_model, monkeypatch) -> list[str]:
    """The C++ kernels, as by default; the kind of every product that they compute."""
    if library() is None:
        pytest.skip("no C++ compiler for the CPU kernels")
    monkeypatch.setattr(PackedLinear, "uses_kernels", True)
    calls: list[str] = []
    product = cpu.packed_linear

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(rest[4])
        return product(x, *rest)

    monkeypatch.setattr(cpu, "packed_linear", counted)
    return calls


IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))


def llama(dtype: torch.dtype = torch.float32, tied: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, **changes}
    config = LlamaConfig(
        vocab_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied, attention_bias=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **sizes,
    )  # fmt: skip
    # Not cast afterwards, which would round the rope's frequencies too, as no loader does.
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def sparse(model: Any, pattern: Pattern = TWO_FOUR) -> dict[str, Tensor]:
    masks = dict(infer_masks(model, pattern, may_be_dense=True))
    apply_masks_(model, masks)
    return masks


def packed(
    folder: Path, model: Any, tokenizer: Any, bits: int | None = None, pattern: Pattern = TWO_FOUR,
    shard_bytes: int = 10**9, group_size: int = 24, num_scale_steps: int = 4,
) -> Path:  # fmt: skip
    """A packed folder of the model, which is pruned, and rounded to what its codes say."""
    masks, quantized = sparse(model, pattern), {}
    for name, keep in masks.items() if bits else ():
        weight = model.get_submodule(name).weight.data
        params = QuantParams("rtn", f"int{bits}", group_size, num_scale_steps=num_scale_steps)
        quantized[name] = quantize_weight(weight, keep, None, params, name)
        weight.copy_(quantized[name].weight_OI)
    save_packed_folder(folder, model, tokenizer, masks, pattern, quantized, folder, shard_bytes)
    return folder


def loaded(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **how})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def greedy(model: Any) -> list[list[int]]:
    return model.generate(IDS, attention_mask=IDS > 0, max_new_tokens=8, do_sample=False).tolist()


def same_files(first: Path, second: Path, names: list[str] | None = None) -> bool:
    names = names or [path.name for path in second.iterdir()]
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_packed_model_is_the_dense_one(tmp_path, tiny_tokenizer, dtype, bits, tied):
    """Logits to the bit, the same tokens, and a save that gives the same files."""
    dense = llama(dtype, tied)
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, bits)
    model = loaded(folder)
    assert model.dtype == dtype
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 14
    inside = model.model.layers.modules()
    assert not any(isinstance(module, nn.Linear) for module in inside)
    assert torch.equal(logits(model), logits(dense))
    assert greedy(model) == greedy(dense)
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "again")
    assert same_files(folder, tmp_path / "again")
    assert {"config.json", INDEX} <= {path.name for path in (tmp_path / "again").iterdir()}
    again = loaded(tmp_path / "again")
    assert torch.equal(logits(again), logits(dense))


def test_what_is_held_is_what_is_stored(tmp_path, tiny_tokenizer):
    """Bytes of parameters and buffers: the files' tensors, and the rope's few frequencies."""
    folder = packed(tmp_path / "packed", llama(torch.bfloat16), tiny_tokenizer, 4)
    model = loaded(folder)
    held = sum(p.nbytes for p in model.parameters())
    assert held == PackedFolder(folder).num_bytes
    assert sum(b.nbytes for b in model.buffers()) < 100
    dense = llama(torch.bfloat16)
    assert held < sum(p.nbytes for p in dense.parameters()) / 2


@pytest.mark.parametrize("pattern", ["4:8", "1:4", "1:3"])
def test_other_patterns(tmp_path, tiny_tokenizer, pattern):
    dense = llama(hidden_size=48, intermediate_size=96)
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, 4, Pattern.parse(pattern))
    assert torch.equal(logits(loaded(folder)), logits(dense))


def test_shards(tmp_path, tiny_tokenizer):
    dense = llama()
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, shard_bytes=9000)
    assert len(PackedFolder(folder).files) > 4
    model = loaded(folder)
    assert torch.equal(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "again", max_shard_size=9000)
    assert len(PackedFolder(tmp_path / "again").files) > 4
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(dense))
    model.save_pretrained(tmp_path / "again")  # over it, in one
    assert len(PackedFolder(tmp_path / "again").files) == 1


@pytest.mark.parametrize("bits", [None, 4])
def test_another_dtype_casts_what_a_dense_model_would_cast(tmp_path, tiny_tokenizer, bits):
    """Values and what is dense; codes and their scales stay, and are rounded once."""
    folder = packed(tmp_path / "packed", llama(torch.bfloat16), tiny_tokenizer, bits)
    for model in (loaded(folder, dtype=torch.float32), loaded(folder).to(torch.float32)):
        layer = model.model.layers[0].mlp.up_proj
        assert layer.weight.dtype == (torch.uint8 if bits else torch.float32)
        if bits:
            assert layer.weight_scales.dtype == torch.float16
        wide = load_model(folder, "float32")  # codes rounded to float32, not to bfloat16 before
        assert torch.equal(logits(model), logits(wide))
    model.save_pretrained(tmp_path / "wide")
    assert torch.equal(logits(loaded(tmp_path / "wide")), logits(model))


def test_a_copy_is_a_model_of_its_own(tmp_path, tiny_tokenizer):
    folder = packed(tmp_path / "packed", llama(), tiny_tokenizer, 4)
    model = loaded(folder)
    other, before = copy.deepcopy(model), logits(model)
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    model.lm_head.weight.data.zero_()
    assert torch.equal(logits(other), before)
    other.save_pretrained(tmp_path / "again")
    assert same_files(folder, tmp_path / "again")


@pytest.mark.parametrize("bits", [None, 4])
def test_dequantize_gives_the_dense_model(tmp_path, tiny_tokenizer, bits):
    dense = llama(torch.bfloat16)
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, bits)
    model = loaded(folder)
    assert type(model.lm_head) is DenseLinear
    model.save_pretrained(tmp_path / "before")  # leaves a text for the dtype in the configuration
    model = model.dequantize()
    assert type(model.lm_head) is nn.Linear
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    for (name, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(logits(loaded(tmp_path / "dense")), logits(dense))


@pytest.mark.parametrize("bits", [None, 4])
def test_device_maps(tmp_path, tiny_tokenizer, bits):
    """`auto`, and a block that is read from the disk when its turn comes."""
    pytest.importorskip("accelerate", reason="transformers places modules with accelerate")
    dense = llama()
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, bits)
    assert torch.equal(logits(loaded(folder, device_map="auto")), logits(dense))
    places = {
        "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
        "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    }  # fmt: skip
    model = loaded(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(model), logits(dense))
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.q_proj is offloaded"):
        model.dequantize()


def python(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=REPOSITORY, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip


STOCK = """
import sys
from transformers import AutoModelForCausalLM
assert "sparsify" not in sys.modules
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
print("answers")
"""


@pytest.mark.parametrize("bits", [None, 4])
def test_transformers_without_the_import_stops_with_words(tmp_path, tiny_tokenizer, bits):
    """It never comes to answer from random weights: the shapes of `weight` are not its own."""
    folder = packed(tmp_path / "packed", llama(), tiny_tokenizer, bits)
    done = python(STOCK, folder)
    assert done.returncode != 0
    assert "answers" not in done.stdout
    assert "Unknown quantization type, got twofour" in done.stderr
    assert "MISMATCH" in done.stderr
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in done.stderr


def test_sparsify_alone_loads_no_torch():
    done = python("import sys, sparsify; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


MEMORY = """
import sys
import torch, transformers, sparsify.integrations
from transformers import AutoModelForCausalLM

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="auto")  # what loading anything imports
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
before = resident("VmRSS")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
for parameter in model.parameters():
    parameter.detach().view(torch.uint8).max()  # files are mapped: read what a use would read
held, loaded = sum(p.nbytes for p in model.parameters()), resident("VmHWM") - before
with torch.no_grad():
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
print(held, loaded, resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_in_use_is_the_packed_size(tmp_path, tiny_tokenizer):
    """Resident at its peak: the packed tensors once and what loading takes; while it computes, the
    tile that is unpacked on top, and never the dense model, which is five times the size.
    """
    small = packed(tmp_path / "small", llama(), tiny_tokenizer, 4)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    folder = packed(tmp_path / "large", model, tiny_tokenizer, 4, group_size=128, num_scale_steps=1)
    dense_bytes = sum(p.nbytes for p in model.parameters())
    done = python(MEMORY, folder, small)
    assert done.returncode == 0, done.stderr
    held, loading, computing = map(int, done.stdout.split())
    assert held == PackedFolder(folder).num_bytes
    assert held < dense_bytes / 5
    # Four threads hash pieces of 8 MB each before; the rest is the loader's and the allocator's.
    assert 0.9 * held < loading < held + 4 * 2**23
    # 32 bytes an element of a tile: columns and groups of its survivors (int64), their codes,
    # scales and values (float32) and what lies between; 32 MB for torch's first products.
    assert computing < held + 4 * 2**23 + 32 * kernel.TILE_ELEMENTS + 2**25 < dense_bytes


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Other tensors, and an index that is right about them."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    write_index(folder, [path.name], config)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_tokenizer) -> Path:
    return packed(tmp_path_factory.mktemp("packed") / "whole", llama(), tiny_tokenizer, 4)


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{Q}.weight"), f"tensor {Q}.weight is missing"),
        (lambda t: t.pop(f"{Q}.weight_scales"), f"tensor {Q}.weight_scales is missing"),
        (lambda t: t.pop(f"{Q}.bias"), f"tensor {Q}.bias is missing (1 in all)"),
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (lambda t: t.update(more=torch.ones(1)), "tensor more is no part of LlamaForCausalLM"),
        (lambda t: t.update({f"{Q}.weight_zeros": torch.zeros(32, 2).byte()}),
         f"tensor {Q}.weight_zeros is no part of LlamaForCausalLM"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}),
         "tensor model.norm.weight has shape (31,) where config.json asks for (32,)"),
        (lambda t: t.update({f"{Q}.weight_indices": torch.zeros(32, 9).byte()}),
         f"tensor {Q}.weight_indices is (32, 9) of U8 where int4-g24"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(whole, tmp_path, capfd, change, said):
    """Before a weight is loaded: no report with a table, no random values."""
    folder = rewritten(Path(shutil.copytree(whole, tmp_path / "copy")), change)
    with pytest.raises(InputError) as caught:
        loaded(folder)
    assert said in message(caught)
    assert "LOAD REPORT" not in capfd.readouterr().err
    with pytest.raises(InputError):
        load_model(folder)  # the dense way in refuses it too


def test_a_flipped_byte_is_refused_in_one_line(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    place = PackedFolder(folder).place(f"{Q}.weight")
    content = bytearray(place.file.read_bytes())
    content[place.start + 7] ^= 16
    place.file.write_bytes(content)
    with pytest.raises(InputError, match=rf"tensor {Q}\.weight in model-00001.*SHA-256") as caught:
        loaded(folder)
    message(caught)
    with pytest.raises(InputError, match=rf"tensor {Q}\.weight in model-00001"):
        load_model(folder)


def changed(whole: Path, to: Path, **fields: Any) -> Path:
    folder = Path(shutil.copytree(whole, to))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {k: v for k, v in fields.items() if k not in config}
    config |= {k: v for k, v in fields.items() if k in config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_configurations_that_do_not_fit_are_refused_in_one_line(whole, tmp_path):
    for number, (fields, said) in enumerate((
        ({"version": 3}, "version 3 of the packed format, this program reads version 2"),
        ({"pattern": "1:4"}, "quantization_config of config.json is not the one"),
        ({"hidden_size": 64}, r"_proj is packed as \(32, 80\), the model's is \(64, 80\)"),
        ({"num_hidden_layers": 1}, r"layers\.1\.\w+\.\w+ is packed, but LlamaForCausalLM has no"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\.\S+ is missing"),
    )):  # fmt: skip
        with pytest.raises(InputError, match=said) as caught:
            loaded(changed(whole, tmp_path / str(number), **fields))
        message(caught)


def test_a_folder_without_its_index_is_refused(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(InputError, match=f"{INDEX} is missing"):
        loaded(folder)


def test_what_is_not_meant_is_refused(whole, tmp_path, tiny_tokenizer):
    model = loaded(whole)
    with pytest.raises(InputError, match="push_to_hub: save the packed model to a folder first"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    assert not model.hf_quantizer.is_trainable
    half = Pattern.parse("unstructured:0.5")
    dense = llama()
    folder = packed(tmp_path / "uneven", dense, tiny_tokenizer, None, half)
    with pytest.raises(InputError, match=r"pattern unstructured:0\.5: packed layers compute N:M"):
        loaded(folder)
    assert torch.equal(logits(load_model(folder)), logits(dense))


@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        "gpt_neox",
        "phi3",
        "opt",
        "falcon",
        "qwen3_moe",
        "llama4_text",
        "gpt_oss",
        "granitemoe",
    ],
)
def test_families(tmp_path, tiny_tokenizer, family):
    """Experts are packed one by one; names that transformers changes while loading are followed."""
    dense = random_family(family, vocab_size=320).eval()
    unfuse_experts(dense)
    masks = sparse(dense)
    save_packed_folder(tmp_path, dense, tiny_tokenizer, masks, TWO_FOUR, None, tmp_path)
    model = loaded(tmp_path)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == len(masks)
    assert torch.equal(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(dense))


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("phimoe", "block_sparse_moe.gate"), ("llama4_text", "feed_forward.router"),
        ("afmoe", "mlp.router.gate"), ("hunyuan_v1_moe", "mlp.gate.wg"),
        ("jetmoe", "mlp.router.layer"), ("dbrx", "ffn.router.layer"),
    ],
)  # fmt: skip
def test_routers_that_are_linear_layers_stay_dense(family, router):
    dense = random_family(family, vocab_size=320).eval()
    unfuse_experts(dense)  # phimoe's, with which modules get the names of its checkpoints
    masks, shapes = sparse(dense), {n: tuple(v.shape) for n, v in dense.state_dict().items()}
    assert not any(name.endswith(router) for name in masks)
    assert any(name.endswith(f"{router}.weight") for name in shapes)
    check_fits(dense, masks, shapes, TWO_FOUR)


@pytest.mark.parametrize("family", ["phimoe", "llama4_text"])
def test_a_layer_that_returns_more_than_a_product_is_refused_by_name(family):
    dense = random_family(family, vocab_size=320).eval()
    unfuse_experts(dense)
    masks, shapes = sparse(dense), {n: tuple(v.shape) for n, v in dense.state_dict().items()}
    routers = [n for n, m in dense.named_modules() if "Router" in type(m).__name__]
    said = (
        rf"{type(dense).__name__} cannot be written packed.*(router|gate) is a \w+, which computes"
    )
    with pytest.raises(InputError, match=said) as caught:
        check_fits(dense, [*masks, *routers], shapes, TWO_FOUR)
    message(caught)


def test_what_transformers_would_not_load_is_refused_before_it_is_written():
    dense = llama()
    masks = sparse(dense)
    shapes = {name: tuple(value.shape) for name, value in dense.state_dict().items()}
    check_fits(dense, masks, shapes, TWO_FOUR)
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be written packed.*\bother\b"):
        check_fits(dense, masks, {**shapes, "other": (3,)}, TWO_FOUR)
    with pytest.raises(InputError, match=r"model\.embed_tokens is packed, but .* no such linear"):
        check_fits(dense, ["model.embed_tokens"], shapes, TWO_FOUR)


# The one function that layers call.


def given(
    scheme: Scheme | None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor], tuple[Any, ...]]:
    """A weight, its parts, and what follows them in a call."""
    generator = torch.Generator().manual_seed(1)
    keep = keep_mask_from_scores(torch.rand(24, 40, generator=generator), TWO_FOUR)
    weight, codes = torch.randn(24, 40, generator=generator).to(dtype).masked_fill(~keep, 0), None
    if scheme is not None:
        weight, codes = coded(scheme, keep, dtype)
    layer, parts = pack_layer("x", weight, keep, TWO_FOUR, codes)
    own = layer.scheme
    return weight, parts, (40, "2:4", own.type, own.bits or 0, own.group_size or 0)


SCHEMES = [
    None, Scheme("int", 4, 16), Scheme("int", 8, 12), Scheme("int", 4, 16, False),
    Scheme("nf4", 4, 8), Scheme("fp8"),
]  # fmt: skip


def call(x: Tensor, parts: dict[str, Tensor], bias: Tensor | None, rest: tuple[Any, ...]) -> Tensor:
    found = [parts.get(f"weight{part}") for part in ("", "_indices", "_scales", "_zeros")]
    return kernel.packed_linear(x, *found, bias, *rest)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_dense_weight(monkeypatch, scheme, dtype):
    weight, parts, rest = given(scheme, dtype)
    bias, x = torch.randn(24).to(dtype), torch.randn(3, 5, 40).to(dtype)
    expected = nn.functional.linear(x, weight, bias)
    assert torch.equal(call(x, parts, bias, rest), expected)
    assert torch.equal(call(x, parts, None, rest), nn.functional.linear(x, weight))
    assert call(x[:0], parts, bias, rest).shape == (0, 5, 24)
    monkeypatch.setattr(kernel, "TILE_ELEMENTS", 200)  # five rows: sums in another order
    tiled = call(x, parts, bias, rest)
    torch.testing.assert_close(tiled, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_an_op_that_torch_may_compile(scheme):
    weight, parts, rest = given(scheme)
    found = [parts.get(f"weight{part}") for part in ("", "_indices", "_scales", "_zeros")]
    arguments = (torch.randn(2, 40), *found, torch.randn(24), *rest)
    tests = ["test_faketensor", "test_aot_dispatch_dynamic"]
    if scheme is None or scheme.type != "fp8":  # which the schema's check cannot compare
        tests.append("test_schema")
    torch.library.opcheck(kernel.packed_linear, arguments, test_utils=tests)
    assert torch.equal(
        torch.compile(lambda x: call(x, parts, None, rest), fullgraph=True, backend="eager")(
            arguments[0]
        ),
        nn.functional.linear(arguments[0], weight),
    )


def test_a_source_is_the_model_without_ties(tmp_path, tiny_tokenizer):
    """What a writer asks for: names in the order of blocks, tied weights once."""
    model = llama(tied=True)
    save_model(model, tiny_tokenizer, tmp_path)
    names = Source(model, None, None, tmp_path).names()
    assert "lm_head.weight" not in names and names == sorted(names)
    assert set(names) == model.state_dict().keys() - {"lm_head.weight"}


def test_every_way_into_a_model_folder_takes_a_packed_one(tmp_path, tiny_tokenizer):
    """Whole, block by block, and by what is stored: dense weights; and its own masks."""
    dense = llama(torch.bfloat16, tied=True)
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, 4)
    check_checkpoint(folder)
    assert reason_to_hold_whole(folder) is None
    assert stored_of(folder, "bfloat16").remarks() == []
    whole = load_model(folder, "bfloat16")
    assert not hasattr(whole.config, "quantization_config")
    for (name, ours), theirs in zip(whole.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    source = BlocksOnDisk(folder, "bfloat16", with_head=True)
    for index, block in enumerate(dense.model.layers):
        opened = source.open(index).state_dict()
        assert all(torch.equal(opened[name], value) for name, value in block.state_dict().items())
    masks, pattern = masks_of(folder)
    assert pattern == TWO_FOUR and masks.keys() == infer_masks(dense, TWO_FOUR).keys()
    assert all(bool((dense.get_submodule(n).weight == 0)[~keep].all()) for n, keep in masks.items())
    assert packed_layers(folder).keys() == masks.keys()
    assert packed_layers(tmp_path) == {}


# The kernels of a CPU, which layers take there by default.


def packed_modules(model: Any) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def aligned(dtype: torch.dtype = torch.float32) -> Any:
    """Of sizes that the kernels' order does not pad."""
    return llama(dtype, hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_cpu_layers_compute_with_the_kernels(tmp_path, tiny_tokenizer, kernels, dtype, bits):
    """Near the dense model, in the packed size, and a save after it gives the same files."""
    dense = aligned(dtype)
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, bits)
    model = loaded(folder)
    names = [name for name, _ in model.named_parameters()]
    found = logits(model)
    assert kernels == [str(dtype).removeprefix("torch.") if bits is None else f"int{bits}"] * 14
    difference = (found.float() - logits(dense).float()).abs().max() / found.float().abs().max()
    assert difference < {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    if dtype == torch.float32:
        assert greedy(model) == greedy(dense)
    assert all(
        module.kind and not module.weight_indices.numel() for module in packed_modules(model)
    )
    assert sum(p.nbytes for p in model.parameters()) == PackedFolder(folder).num_bytes
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(p.requires_grad for m in packed_modules(model) for p in m.parameters())
    model.save_pretrained(tmp_path / "again")
    assert same_files(folder, tmp_path / "again")
    assert torch.equal(logits(model), found)


def test_the_embedded_model_answers_the_same_from_the_kernels(tmp_path, kernels):
    """The project's own model, pruned, in float32: the same tokens; logits differ by rounding."""
    dense = load_model("embedded", "float32").eval()
    folder = packed(tmp_path / "packed", dense, load_tokenizer("embedded"))
    model = loaded(folder)
    found, expected = logits(model), logits(dense)
    assert kernels and set(kernels) == {"float32"}
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    how = {"attention_mask": IDS > 0, "max_new_tokens": 24, "do_sample": False}
    assert torch.equal(model.generate(IDS, **how), dense.generate(IDS, **how))


@pytest.mark.parametrize("bits", [None, 4])
def test_after_a_product_everything_works_as_before_it(tmp_path, tiny_tokenizer, kernels, bits):
    """Copies, casts, states and dense layers find the tensors of the files."""
    dense = llama(torch.bfloat16)  # of sizes that are padded
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, bits)
    model, fresh = loaded(folder), loaded(folder)
    before = logits(model)
    other = copy.deepcopy(model)
    for module in packed_modules(model):
        module.weight.data.zero_()
    assert torch.equal(logits(other), before)
    ours, theirs = other.state_dict(), fresh.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model.load_state_dict(ours)
    assert torch.equal(logits(model), before)
    wide = loaded(folder, dtype=torch.float32)
    assert torch.equal(logits(model.to(torch.float32)), logits(wide))
    assert packed_modules(model)[0].kind == ("int4" if bits else "float32")
    assert packed_modules(model.to("meta"))[0].weight_indices.numel() > 0
    logits(other)
    for (name, ours), theirs in zip(
        other.dequantize().named_parameters(), dense.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def single(scheme: Scheme | None) -> tuple[PackedLinear, Tensor, dict[str, Tensor]]:
    """A layer, the weight that it stands for, and its tensors."""
    weight, parts, _ = given(scheme)
    module = PackedLinear(Layer((24, 40), scheme or Scheme(), TWO_FOUR), torch.float32, False)
    module.load_state_dict(parts)
    return module, weight, parts


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiling_takes_the_kernels_whole(kernels, scheme, mode):
    """At its first product or later, and again after the tensors went back to the files' order."""
    torch._dynamo.reset()
    module, weight, parts = single(scheme)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 40)
    expected = nn.functional.linear(x, weight)
    with mode():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
            assert kernels and module.kind == kernels[0]
            state = module.state_dict()
            for name, part in parts.items():
                assert torch.equal(state[name].view(torch.uint8), part.view(torch.uint8)), name
        assert module(x[:0]).shape == (0, 5, 24)
    with torch.inference_mode(False):
        module.weight.data.view(torch.uint8).zero_()  # no tensor of inference mode


@pytest.mark.parametrize(
    "scheme", [Scheme("int", 8, 12, False), Scheme("int", 4, 6), Scheme("nf4", 4, 10)]
)
def test_what_the_kernels_refuse_computes_in_pytorch(kernels, scheme):
    module, weight, _ = single(scheme)
    x = torch.randn(3, 40)
    assert torch.equal(module(x), nn.functional.linear(x, weight))
    assert module.kind is None and not kernels


def test_another_input_or_the_switch_brings_pytorch_back(kernels):
    module, weight, _ = single(Scheme("int", 4, 16))
    x = torch.randn(3, 40)
    module(x)
    assert module.kind == "int4"
    assert torch.equal(module(x.double()), nn.functional.linear(x.double(), weight.double()))
    assert module.kind is None
    module(x)
    module.uses_kernels = False
    assert torch.equal(module(x), nn.functional.linear(x, weight))
    assert module.kind is None and len(kernels) == 2
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.randn(3, 44))


def test_other_patterns_stay_in_pytorch(tmp_path, tiny_tokenizer, kernels):
    dense = llama()
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, 4, Pattern.parse("1:4"))
    assert torch.equal(logits(loaded(folder)), logits(dense))
    assert not kernels


def test_what_is_offloaded_stays_in_pytorch(tmp_path, tiny_tokenizer, kernels):
    """Its tensors come and go with every product; those beside it take the kernels."""
    accelerate = pytest.importorskip("accelerate", reason="transformers places with accelerate")
    dense = llama()
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, 4)
    places = {
        "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
        "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    }  # fmt: skip
    model = loaded(folder, device_map=places, offload_folder=tmp_path / "offload")
    for _ in range(2):
        torch.testing.assert_close(logits(model), logits(dense))
    assert len(kernels) == 14
    assert all(module.kind for module in packed_modules(model.model.layers[0]))
    assert all(module.weight.is_meta for module in packed_modules(model.model.layers[1]))
    whole = loaded(folder)
    before = logits(whole)  # in the kernels' order when it is offloaded
    whole = accelerate.disk_offload(whole, str(tmp_path / "whole"), execution_device="cpu")
    kernels.clear()
    for _ in range(2):
        torch.testing.assert_close(logits(whole), before)
    assert not kernels


def test_without_a_compiler_layers_compute_in_pytorch(tmp_path, tiny_tokenizer, monkeypatch):
    """One warning, and the bits of the dense model."""
    dense = llama()
    folder = packed(tmp_path / "packed", dense, tiny_tokenizer, 4)
    monkeypatch.setattr(PackedLinear, "uses_kernels", True)
    use_folder(tmp_path / "cache", str(tmp_path / "no-compiler"))
    try:
        with pytest.warns(RuntimeWarning, match="CPU kernels: .*run in PyTorch") as warned:
            found = logits(model := loaded(folder))
        assert torch.equal(found, logits(dense))
        assert greedy(model) == greedy(dense)
        assert sum("CPU kernels" in str(entry.message) for entry in warned) == 1
        assert not any(module.kind for module in packed_modules(model))
    finally:
        use_folder(None)
