"""Experts that a family's files hold as one tensor: taken apart, pruned, written as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import sparsify.integrations  # noqa: F401  transformers reads packed weights
from jobs.benchmarks.support.families import random_family
from jobs.workers.prune_inputs import _Weights
from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.layers import prunable_linears
from sparsify.comm import Comm
from sparsify.errors import InputError, PatternViolationError
from sparsify.formats.kinds import Export, get_format
from sparsify.formats.kinds.compressed_tensors import check_family
from sparsify.formats.source import masks_of_source, open_source
from sparsify.formats.sparse_folder import MASKS, read_sparsity, write_sparsity
from sparsify.formats.verify import check_files, masks_of
from sparsify.masks.select import find_violation
from sparsify.masks.storage import load_masks, merge_masks
from sparsify.methods import get_method
from sparsify.models.blocks import (
    BlocksOnDisk,
    ShardWriter,
    block_tensors,
    layer_places,
    reason_to_hold_whole,
)
from sparsify.models.experts import ScaledExperts, expert_layers
from sparsify.models.fewer_layers import write_fewer
from sparsify.models.layout import Fused, layout_of
from sparsify.models.load import load_model
from sparsify.models.masked import apply_masks_, mask_gradients
from sparsify.models.save import save_model
from sparsify.models.structure import find_blocks, fused_experts
from sparsify.models.unfuse import unfuse_experts
from sparsify.pattern import Pattern
from sparsify.pruning.prune import PruneResult, prune_checkpoint, prune_model
from tests.conftest import message
from tests.families import FEW_STEPS, token_rows

PATTERN = Pattern.parse("2:4")
FAMILIES = ("llama4_text", "gpt_oss", "granitemoe", "granitemoehybrid", "dbrx")
INPUTS = {
    "llama4_text": {"experts.gate_up_proj": 1, "experts.down_proj": 1},
    "gpt_oss": {"experts.gate_up_proj": 1, "experts.down_proj": 1},
    "granitemoe": {"input_linear.weight": 2, "output_linear.weight": 2},
    "granitemoehybrid": {"input_linear.weight": 2, "output_linear.weight": 2},
    "dbrx": {"mlp.w1": 1, "mlp.v1": 1, "mlp.w2": 0},
}
"""the end of a stored tensor's name -> its dimension of input features; DBRX's experts, one below
the other, have 48 rows, which are whole groups"""


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=token_rows(2, 20, seed=5).ids_NT, use_cache=False).logits
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    tensors = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
    return {name: value for of_file in tensors for name, value in of_file.items()}


def experts_in(folder: Path, family: str) -> Iterator[tuple[str, Tensor]]:
    """The stored matrices of all experts, input features last, by hand."""
    for name, value in stored(folder).items():
        for end, dimension in INPUTS[family].items():
            if name.endswith(end) and (family == "dbrx" or value.ndim == 3):
                rows = value.movedim(dimension, -1)
                yield name, rows if family == "dbrx" else rows.flatten(0, 1)


def prune(path: Path, out: Path, **options: Any) -> PruneResult:
    """As the stage does: blocks, then masks and what describes them."""
    result = prune_checkpoint(
        path, out, token_rows(16), get_method("twofour"), PATTERN, FEW_STEPS,
        memory=Memory(8), **{"comm": Comm.single(), **options},
    )  # fmt: skip
    merge_masks(sorted(out.glob("masks-*")), out / MASKS)
    for path in out.glob("masks-*"):
        path.unlink()
    write_sparsity(out, load_masks(out / MASKS), "2:4", "twofour", {})
    return result


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dense")
    for family in FAMILIES:
        random_family(family).save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="module")
def pruned(dense: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pruned")
    for family in FAMILIES:
        prune(dense[family], folder / family)
    return {family: folder / family for family in FAMILIES}


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_a_stored_tensor_is_made_of_its_parts_and_back(transposed: bool, interleaved: bool) -> None:
    """By indices written out: expert 1, gate's row 2, its column 4."""
    parts = tuple((f"{e}.gate", f"{e}.up") for e in range(3))
    fused = Fused("all", parts, transposed, interleaved)
    shape = (3, 6, 10) if transposed else (3, 10, 6)
    whole = torch.arange(180).view(shape)
    row = {"gate": 2 * 2 if interleaved else 2, "up": 2 * 2 + 1 if interleaved else 5 + 2}
    assert fused.part_shape(shape) == (5, 6) and fused.part_shape((4, 10, 6)) == ()
    for number, name in enumerate(("gate", "up")):
        place = (1, 4, row[name]) if transposed else (1, row[name], 4)
        assert fused.part(whole[1], number)[2, 4] == whole[place]
    tensors = {
        name: fused.part(whole[e], number)
        for e, names in enumerate(parts)
        for number, name in enumerate(names)
    }
    assert torch.equal(fused.whole(tensors), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_experts_compute_what_the_fused_ones_do(family: str, dense: dict[str, Path]) -> None:
    """To rounding: the sums over rows and experts run in other orders (measured: 1.3e-6 of 3.2)."""
    stock, model = AutoModelForCausalLM.from_pretrained(dense[family]), load_model(dense[family])
    assert fused_experts(stock) and not fused_experts(model)
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=3e-6)
    count = sum(p.numel() for p in stock.parameters())
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_and_written_again_is_the_checkpoint(
    family: str, dtype: str, tmp_path: Path
) -> None:
    random_family(family).to(getattr(torch, dtype)).save_pretrained(tmp_path / "dense")
    assert reason_to_hold_whole(tmp_path / "dense") is None
    source = BlocksOnDisk(tmp_path / "dense", dtype)
    writer = ShardWriter(tmp_path / "blocks", source)
    for index in range(len(source.blocks)):
        block = source.open(index)
        assert all(p.is_contiguous() for p in block.parameters())
        writer.write_block(index, block_tensors(f"{source.list_name}.{index}.", block))
    writer.finish(source)
    assert save_model(load_model(tmp_path / "dense", dtype), None, tmp_path / "whole")
    wanted = stored(tmp_path / "dense")
    for copy in ("blocks", "whole"):
        found = stored(tmp_path / copy)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_pruned_along_its_inputs(
    family: str, dense: dict[str, Path], pruned: dict[str, Path], tmp_path: Path
) -> None:
    matrices = dict(experts_in(pruned[family], family))
    assert len(matrices) == 3 * len(INPUTS[family])
    for name, weight_RI in matrices.items():
        assert find_violation(weight_RI, PATTERN) is None, name
        assert int((weight_RI != 0).sum()) * 2 == weight_RI.numel(), name
    assert stored(pruned[family]).keys() == stored(dense[family]).keys()
    masks = load_masks(pruned[family] / MASKS)
    model = load_model(pruned[family])
    names = {f"{find_blocks(model)[0]}.{i}.{n}" for i, b in enumerate(find_blocks(model)[1])
             for n in expert_layers(b)}  # fmt: skip
    assert len(names) == 3 * 4 * 3 and names < masks.keys()
    described = read_sparsity(pruned[family]) or {}
    assert not any("expert" in name and "bias" not in name for name in described["model"]["dense"])
    total = sum(v.numel() for v in stored(pruned[family]).values())
    assert described["model"]["num_weights"] == total

    before = check_files(pruned[family], masks, PATTERN)
    assert before["num_layers"] == len(masks) and before["num_violations"] == 0
    tensors = stored(pruned[family])
    name, value = next((n, tensors[n]) for n in matrices)
    value.flatten()[(value.flatten() == 0).nonzero()[0]] = 1.0
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    (tmp_path / "bad" / "config.json").write_bytes((pruned[family] / "config.json").read_bytes())
    with pytest.raises(PatternViolationError, match=r"experts\.0\.\w+: 1 pruned weights are not"):
        check_files(tmp_path / "bad", masks, PATTERN)


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_folders_load_without_this_project_and_give_the_same(
    family: str, pruned: dict[str, Path], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    source = open_source(pruned[family], None)
    masks, pattern = masks_of_source(source)
    export = Export(source, masks, pattern, tiny_tokenizer, tmp_path, 20_000)
    (written,) = get_format("dense").write(export)
    assert written.gate["num_violations"] == 0 and written.gate["num_layers"] == len(masks)
    found, wanted = stored(tmp_path / "sparse"), stored(pruned[family])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    model = load_model(pruned[family])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert fused_experts(stock)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=3e-6)

    (written,) = get_format("packed").write(export)
    assert written.gate["num_layers"] == len(masks)
    assert torch.equal(logits(load_model(tmp_path / "sparse-packed")), logits(model))
    assert reason_to_hold_whole(tmp_path / "sparse-packed") is None
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse-packed")
    packed.dequantize().save_pretrained(tmp_path / "dequantised")
    again = stored(tmp_path / "dequantised")
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], value) for name, value in wanted.items())
    with pytest.raises(InputError, match="holds all experts of a layer as one tensor") as caught:
        check_family(model)
    message(caught)


def test_a_budget_reads_experts_of_what_was_pruned(pruned: dict[str, Path]) -> None:
    model = load_model(pruned["llama4_text"])
    names = [name for _, name, _ in prunable_linears(model)]
    weights = _Weights(pruned["llama4_text"], names)
    assert any(".experts." in name for name in names)
    for name in names:
        assert torch.equal(weights[name], model.get_submodule(name).weight)


def test_who_names_a_router_gets_what_is_the_case(dense: dict[str, Path]) -> None:
    model = load_model(dense["llama4_text"])
    everything = [name for _, name, _ in prunable_linears(model)]
    assert [name for _, name, _ in prunable_linears(model, ["*router"])] == everything
    with pytest.raises(InputError, match=r"\*rooter matches no linear layer"):
        prunable_linears(model, ["*rooter"])


@pytest.mark.parametrize("family", ["llama4_text", "gpt_oss", "granitemoe"])
def test_recovery_keeps_the_zeros(family: str, pruned: dict[str, Path], tmp_path: Path) -> None:
    student = load_model(pruned[family])
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    masks, _ = masks_of(pruned[family])
    apply_masks_(student, masks)
    mask_gradients(student, masks)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(2):
        ids = token_rows(4).ids_NT
        student(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(student, None, tmp_path)  # type: ignore[arg-type]
    gate = check_files(tmp_path, masks, PATTERN)
    assert gate["num_violations"] == 0 and gate["num_layers"] == len(masks)
    again = load_model(tmp_path)
    for name, value in student.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name
        if ".experts." in name and not name.endswith("bias"):
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("family", ["llama4_text", "gpt_oss"])
def test_a_killed_run_comes_out_the_same(
    family: str, dense: dict[str, Path], pruned: dict[str, Path], tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(dense[family], tmp_path / "killed", on_block=stop)
    prune(dense[family], tmp_path / "killed")
    files = sorted(pruned[family].glob("m*.safetensors"))
    assert len(files) == 4
    for path in files:
        twin = tmp_path / "killed" / path.name
        digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, twin)]
        assert digests[0] == digests[1], path.name


@pytest.mark.parametrize("family", ["llama4_text", "gpt_oss", "granitemoe"])
def test_from_the_disk_and_in_memory_the_same(
    family: str, dense: dict[str, Path], pruned: dict[str, Path]
) -> None:
    model: Any = load_model(dense[family])
    prune_model(
        model, token_rows(16), get_method("twofour"), PATTERN, FEW_STEPS, comm=Comm.single(),
        memory=Memory(8),
    )  # fmt: skip
    found = {name: place.read(None) for name, place in layer_places(pruned[family])}
    for name, weight in model.state_dict().items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("family", ["llama4_text", "gpt_oss", "dbrx"])
def test_layers_are_dropped_and_experts_left_out_by_zeros(
    family: str, dense: dict[str, Path], tmp_path: Path
) -> None:
    """Of layers 0, 1 and 2 the second goes, and of the third one expert's down projection."""
    model = load_model(dense[family])
    list_name, blocks = find_blocks(model)
    layer = next(n for n in expert_layers(blocks[2]) if n.endswith("experts.1.down_proj"))
    zeroed = [f"{list_name}.2.{layer}.{kind}" for kind in ("weight", "bias")]
    write_fewer(dense[family], tmp_path, [0, 2], zeroed)
    short = load_model(tmp_path)
    state, wanted = short.state_dict(), model.state_dict()
    for name in zeroed:
        if name in wanted:
            wanted[name].zero_()
    for name, value in state.items():
        old = name.replace(f"{list_name}.1.", f"{list_name}.2.")
        assert torch.equal(value, wanted[old]), name
    assert len(short.state_dict()) < len(wanted)
    assert find_blocks(short)[0] == list_name and len(find_blocks(short)[1]) == 2
    fused = {name for name in stored(tmp_path) if "experts" in name}
    assert fused < {name for name in stored(dense[family]) if "experts" in name}


@torch.no_grad()
def test_an_expert_of_llama_4_sees_its_tokens_alone() -> None:
    model: Any = random_family("llama4_text")
    block = find_blocks(model)[1][0].feed_forward
    hidden_BTD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    before, _ = block(hidden_BTD)
    scores, _ = block.router(hidden_BTD.flatten(0, 1))
    unfuse_experts(model)
    assert isinstance(block.experts, ScaledExperts)
    inputs: dict[str, Tensor] = {}
    for name, expert in block.experts.named_children():
        expert.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0])
        )
    after, _ = block(hidden_BTD)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    num_active = model.config.num_experts_per_tok
    assert sum(map(len, inputs.values())) == 18 * num_active < 18 * 4
    for number, (name, expert) in enumerate(block.experts.named_children()):
        sent_T = scores[:, number].nonzero()[:, 0]
        assert torch.equal(expert.tokens_T, sent_T)
        scaled = hidden_BTD.flatten(0, 1)[sent_T] * scores[sent_T, number, None]
        assert torch.equal(inputs[name], scaled)


def test_experts_of_llama_4_without_tokens_have_a_gradient() -> None:
    model: Any = random_family("llama4_text")
    unfuse_experts(model)
    experts: Any = find_blocks(model)[1][0].feed_forward.experts
    scaled_SD = torch.zeros(4 * 5, 32)
    scaled_SD[:5] = torch.randn(5, 32)
    experts(scaled_SD).sum().backward()
    assert experts.get_submodule("0").up_proj.weight.grad.any()
    idle = experts.get_submodule("3").up_proj.weight.grad
    assert idle is not None and not idle.any()


def test_a_family_that_stores_experts_one_by_one_has_no_such_layout() -> None:
    model = random_family("mixtral")
    unfuse_experts(model)
    assert not layout_of(model).fused and not layout_of(model).renamed
    check_family(model)
