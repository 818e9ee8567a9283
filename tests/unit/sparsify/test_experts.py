"""Experts of a mixture as linear layers: same function, same names, pruned, few tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from jobs.benchmarks.support.families import random_family
from sparsify.calibration.accumulate import MomentSums
from sparsify.calibration.groups import find_groups
from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.routed import dense_inputs_of
from sparsify.comm import Comm
from sparsify.errors import CalibrationError
from sparsify.formats.verify import check_files
from sparsify.masks.select import find_violation
from sparsify.masks.storage import load_masks, merge_masks
from sparsify.methods import get_method
from sparsify.models.blocks import reason_to_hold_whole
from sparsify.models.calls import BlockInputs, run_block
from sparsify.models.experts import RoutedExperts, expert_layers
from sparsify.models.load import build_model, load_model
from sparsify.models.save import save_model
from sparsify.models.structure import find_blocks, fused_experts, linears_of
from sparsify.models.unfuse import unfuse_experts
from sparsify.models.watch import shared_input_groups
from sparsify.pattern import Pattern
from sparsify.pruning.coverage import coverage
from sparsify.pruning.progress import lent_remark
from sparsify.pruning.prune import PruneResult, prune_checkpoint, prune_model
from tests.families import FEW_STEPS, token_rows

PATTERN = Pattern.parse("2:4")
SPLIT = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "phimoe", "deepseek_v2",
    "deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe", "lfm2_moe", "nemotron_h",
)  # fmt: skip
"""families whose checkpoints hold experts one by one"""
FUSED = ("jetmoe",)
"""families whose experts compute in a way of their own"""


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = token_rows(2, 20, seed=5).ids_NT
    found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    tensors = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
    return {name: value for of_file in tensors for name, value in of_file.items()}


def prune(path: Path, out: Path, method: str = "twofour", **options: Any) -> PruneResult:
    return prune_checkpoint(
        path, out, token_rows(16), get_method(method), PATTERN, FEW_STEPS,
        memory=Memory(8), **{"comm": Comm.single(), **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    random_family("mixtral").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", SPLIT)
def test_linear_experts_compute_the_same_under_the_names_of_the_checkpoint(
    family: str, tmp_path: Path
) -> None:
    fused = random_family(family)
    before, num_weights = logits(fused), sum(p.numel() for p in fused.parameters())
    assert fused_experts(fused)
    fused.save_pretrained(tmp_path / "fused")
    model = load_model(tmp_path / "fused")
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    assert not fused_experts(model) and not coverage(model).num_experts
    assert sum(p.numel() for p in model.parameters()) == num_weights
    empty = build_model(tmp_path / "fused")
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    has_names = save_model(model, None, tmp_path / "again")
    again = stored(tmp_path / "again")
    if has_names:  # the very tensors of the checkpoint
        assert again.keys() == stored(tmp_path / "fused").keys()
        assert all(torch.equal(again[n], t) for n, t in stored(tmp_path / "fused").items())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(stock), before)


@pytest.mark.parametrize("family", FUSED)
def test_experts_that_are_not_taken_apart_stay_dense_and_are_named(family: str) -> None:
    model = random_family(family)
    before, names = logits(model), fused_experts(model)
    unfuse_experts(model)
    assert fused_experts(model) == names and torch.equal(logits(model), before)
    said = coverage(model).remark()
    assert said is not None and f"such as {names[0]}" in said and "of them fused experts" in said


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2", "deepseek_v3", "qwen3_moe"])
def test_files_are_read_block_by_block(family: str, tmp_path: Path) -> None:
    random_family(family).save_pretrained(tmp_path)
    assert reason_to_hold_whole(tmp_path) is None


def test_old_names_still_find_what_was_renamed(mixtral: Path) -> None:
    block: Any = find_blocks(load_model(mixtral))[1][0]
    assert block.mlp is block.block_sparse_moe
    names = [name for name, _ in block.named_children()]
    assert names == ["self_attn", "block_sparse_moe", "input_layernorm", "post_attention_layernorm"]
    assert isinstance(block.mlp.experts, RoutedExperts)


@torch.no_grad()
def test_an_expert_is_called_with_the_tokens_that_are_sent_to_it_and_always() -> None:
    torch.manual_seed(0)
    model = random_family("mixtral")
    unfuse_experts(model)
    experts: Any = find_blocks(model)[1][0].mlp.experts
    hidden_TD = torch.randn(7, 32)
    index_TK = torch.tensor([[0, 2], [2, 0], [0, 1], [1, 2], [2, 1], [0, 2], [1, 0]])
    weights_TK = torch.rand(7, 2)
    seen: dict[str, int] = {}
    for name, expert in experts.named_children():
        expert.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, len(args[0]))
        )
    found_TD = experts(hidden_TD, index_TK, weights_TK)
    assert seen == {"0": 5, "1": 4, "2": 5, "3": 0}
    for token in range(7):
        wanted_D = torch.zeros(32)
        for place, number in enumerate(index_TK[token].tolist()):
            expert = experts.get_submodule(str(number))
            inner = nn.functional.silu(linear(hidden_TD[token], expert.w1.weight))
            inner = inner * linear(hidden_TD[token], expert.w3.weight)
            wanted_D += weights_TK[token, place] * linear(inner, expert.w2.weight)
        torch.testing.assert_close(found_TD[token], wanted_D, rtol=1e-5, atol=1e-6)
    assert experts.get_submodule("1").tokens_T.tolist() == [2, 3, 4, 6]


def test_an_expert_without_tokens_has_a_gradient() -> None:
    model = random_family("mixtral")
    unfuse_experts(model)
    experts: Any = find_blocks(model)[1][0].mlp.experts
    index_TK = torch.zeros(5, 1, dtype=torch.long)
    experts(torch.randn(5, 32), index_TK, torch.ones(5, 1)).sum().backward()
    assert experts.get_submodule("0").w2.weight.grad.any()
    idle = experts.get_submodule("3").w2.weight.grad
    assert idle is not None and not idle.any()


class Mixture(nn.Module):
    """A block of experts alone, routed by the sign of two columns; nothing goes to expert 2."""

    def __init__(self) -> None:
        super().__init__()
        model = random_family("mixtral", num_local_experts=3)
        unfuse_experts(model)
        self.experts: Any = find_blocks(model)[1][0].mlp.experts

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        flat_TD = hidden_BTD.flatten(0, 1)
        index_T1 = self.route(flat_TD)[:, None]
        return self.experts(flat_TD, index_T1, torch.ones(len(flat_TD), 1)).view_as(hidden_BTD)

    @staticmethod
    def route(flat_TD: Tensor) -> Tensor:
        return (flat_TD[:, 0] > 1.5).long()


def mean_of(left_TL: Tensor, right_TI: Tensor) -> Tensor:
    return left_TL.T @ right_TI / len(right_TI)


@torch.no_grad()
def test_moments_are_of_the_tokens_of_each_expert_and_lent_where_these_are_few() -> None:
    torch.manual_seed(0)
    block = Mixture()
    mine, dense = (BlockInputs(torch.randn(2, 150, 32), (), {}) for _ in range(2))
    groups = find_groups(block, mine, shared_input_groups(block, mine))
    assert groups.names[:2] == [["experts.0.w1", "experts.0.w3"], ["experts.0.w2"]]
    assert not groups.is_in_order and not groups.residuals
    sums = MomentSums(block, groups.names, with_teacher=True)
    sums.add_pair(mine, dense, None)
    found = sums.reduce(Comm.single()).moments

    x, y = (call.hidden_BTD.flatten(0, 1) for call in (mine, dense))
    to, dense_to = block.route(x), block.route(y)
    first, second = to == 0, to == 1
    few = int(second.sum())
    assert 0 < few < 32 < int(first.sum())
    enough = found["experts.0.w1"]
    torch.testing.assert_close(enough.hessian_II, mean_of(x[first], x[first]))
    assert (enough.num_tokens, enough.num_lent) == (len(x) - few, 0)
    partner = torch.where((dense_to == 0)[:, None], y, x)  # its own where the dense one has none
    assert enough.cross_II is not None
    torch.testing.assert_close(enough.cross_II, mean_of(partner[first], x[first]))

    lent = found["experts.1.w1"]
    assert (lent.num_tokens, lent.num_lent) == (few, 32 - few)
    every = mean_of(x, x)
    own = mean_of(x[second], x[second])
    torch.testing.assert_close(lent.hessian_II, (few * own + (32 - few) * every) / 32)
    idle = found["experts.2.w1"]
    assert (idle.num_tokens, idle.num_lent) == (0, 32)
    torch.testing.assert_close(idle.hessian_II, every)
    assert idle.cross_II is not None and torch.equal(idle.cross_II, idle.hessian_II)
    inner = found["experts.2.w2"]
    assert torch.equal(inner.hessian_II, torch.eye(48)) and inner.num_lent == 48
    within = found["experts.1.w2"]
    share = few / 48
    expert = block.experts.get_submodule("1")
    z = nn.functional.silu(expert.w1(x[second])) * expert.w3(x[second])
    size = z.square().mean() * torch.eye(48)
    torch.testing.assert_close(
        within.hessian_II, share * mean_of(z, z) + (1 - share) * size, rtol=1e-4, atol=1e-6
    )


@torch.no_grad()
def test_token_weights_are_those_of_the_tokens_of_the_expert() -> None:
    torch.manual_seed(0)
    block = Mixture()
    call = BlockInputs(torch.randn(2, 150, 32), (), {})
    weights_BT = torch.rand(2, 150)
    groups = find_groups(block, call, shared_input_groups(block, call))
    sums = MomentSums(block, groups.names, with_teacher=False)
    sums.add(call, weights_BT)
    found = sums.reduce(Comm.single()).moments["experts.0.w1"].hessian_II
    x = call.hidden_BTD.flatten(0, 1)
    mine = block.route(x) == 0
    x, w = x[mine], weights_BT.flatten()[mine]
    torch.testing.assert_close(found, (x * w[:, None]).T @ x / w.sum())


def test_dense_inputs_are_found_by_token() -> None:
    inputs, dense = torch.zeros(4, 2), torch.arange(6.0).view(3, 2)
    found = dense_inputs_of(inputs, torch.tensor([1, 4, 7, 9]), dense, torch.tensor([0, 4, 9]))
    assert found.tolist() == [[0, 0], [2, 3], [0, 0], [4, 5]]
    nothing = torch.empty(0, dtype=torch.long)
    assert torch.equal(dense_inputs_of(inputs, torch.arange(4), dense[:0], nothing), inputs)
    assert dense_inputs_of(inputs[:0], nothing, dense, torch.arange(3)).shape == (0, 2)


def test_experts_are_pruned_and_stock_transformers_loads_the_folder(
    mixtral: Path, tmp_path: Path
) -> None:
    result = prune(mixtral, tmp_path / "out")
    model = load_model(tmp_path / "out")
    experts = [n for b in find_blocks(model)[1] for n in expert_layers(b)]
    assert len(experts) == 3 * 4 * 3
    assert len(result.layers) == 3 * (4 + 4 * 3)
    weights = stored(tmp_path / "out")
    for report in result.layers:
        assert find_violation(weights[f"{report.name}.weight"], PATTERN) is None
    layers = [weights[f"{report.name}.weight"] for report in result.layers]
    pruned = sum(weight.numel() for weight in layers)
    assert sum(int((weight == 0).sum()) for weight in layers) == pruned / 2
    assert pruned / sum(p.numel() for p in model.parameters()) > 0.9
    assert weights.keys() >= stored(mixtral).keys()
    merge_masks(sorted((tmp_path / "out").glob("masks-*")), tmp_path / "masks.safetensors")
    for path in (tmp_path / "out").glob("masks-*"):
        path.unlink()
    counts = check_files(tmp_path / "out", load_masks(tmp_path / "masks.safetensors"), PATTERN)
    assert counts["num_violations"] == 0 and counts["num_weights"] == pruned
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert fused_experts(stock)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-6)


def test_from_the_disk_and_in_memory_the_same(mixtral: Path, tmp_path: Path) -> None:
    prune(mixtral, tmp_path / "out", "sparsegpt")
    model: Any = load_model(mixtral)
    prune_model(
        model, token_rows(16), get_method("sparsegpt"), PATTERN, FEW_STEPS, comm=Comm.single(),
        memory=Memory(8),
    )  # fmt: skip
    found = stored(tmp_path / "out")
    for name, weight in model.state_dict().items():
        assert torch.equal(found[name], weight), name


def test_a_killed_run_comes_out_the_same(mixtral: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(mixtral, tmp_path / "killed", on_block=stop)
    resumed = prune(mixtral, tmp_path / "killed")
    whole = prune(mixtral, tmp_path / "whole")
    assert [r.name for r in resumed.layers] == [r.name for r in whole.layers]
    for path in (tmp_path / "whole").glob("m*.safetensors"):
        twin = tmp_path / "killed" / path.name
        digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, twin)]
        assert digests[0] == digests[1], path.name


@pytest.mark.parametrize("method", ["twofour", "sparsegpt", "magnitude"])
def test_an_expert_that_no_token_reaches_is_pruned_and_named(method: str) -> None:
    model: Any = random_family("deepseek_v3")
    unfuse_experts(model)
    for block in model.model.layers[1:]:
        block.mlp.gate.e_score_correction_bias[3] = -1e9
    result = prune_model(
        model, token_rows(16), get_method(method), PATTERN, FEW_STEPS, comm=Comm.single(),
        memory=Memory(8),
    )  # fmt: skip
    starved = [report for report in result.layers if ".experts.3." in report.name]
    assert [report.name.rpartition(".")[2] for report in starved] == 2 * [
        "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    for report in starved:
        assert (report.num_tokens, report.num_lent) == (0, report.shape[1])
        assert report.sparsity == 0.5
        weight = model.get_submodule(report.name).weight
        assert find_violation(weight, PATTERN) is None and weight.any()
    others = [report for report in result.layers if ".experts.3." not in report.name]
    assert all(report.num_lent == 0 and report.num_tokens > 0 for report in others)
    said = lent_remark(result.layers)
    assert said is not None and said.startswith(f"6 of {len(result.layers)} layers")
    assert f"{starved[0].name} (0)" in said and "and 3 more" in said
    assert lent_remark(others) is None


def test_a_layer_outside_experts_still_needs_tokens() -> None:
    class Never(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x)[:, :0].sum()

    block = Never()
    sums = MomentSums(block, [["layer"]], with_teacher=False)
    sums.add(BlockInputs(torch.zeros(1, 0, 4), (), {}), None)
    with pytest.raises(CalibrationError, match="no calibration token reached this layer"):
        sums.reduce(Comm.single())
    assert set(linears_of(block)) == {"layer"} and not expert_layers(block)
    assert run_block(block, BlockInputs(torch.zeros(1, 2, 4), (), {})).shape == (1, 2, 4)
