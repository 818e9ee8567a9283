"""Forwards that pause before a block's layers, and the walk that measures layer by layer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify.calibration.accumulate import MomentSums, TargetShares
from sparsify.calibration.groups import (
    BLOCK_INPUT,
    LayerGroups,
    PausableBlock,
    find_groups,
    run_groups,
)
from sparsify.calibration.hidden_states import HiddenStateStore, Memory
from sparsify.calibration.layers import InputOrder, Layer, SolverNeeds
from sparsify.calibration.walk import walk_blocks
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError, NonFiniteError
from sparsify.methods import Problem, PruneParams, get_method
from sparsify.methods._target import shrinkage, teacher_target
from sparsify.models.blocks import BlocksInMemory
from sparsify.models.calls import BlockCalls, BlockInputs, run_block
from sparsify.models.structure import find_blocks, linears_of
from sparsify.models.watch import shared_input_groups, watch_inputs, watch_outputs
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, prune_model
from tests.families import FAMILIES, FEW_STEPS, in_two_documents, tiny, token_rows

NUM_ROWS = 6


def first_block(family: str) -> tuple[nn.Module, list[BlockInputs], LayerGroups]:
    """A block, its calls for three batches, and its groups."""
    model = tiny(family)
    blocks = find_blocks(model)[1]
    calls = BlockCalls(model, blocks)
    rows = token_rows(NUM_ROWS)
    batches = [calls.first(rows[start : start + 2]) for start in range(0, NUM_ROWS, 2)]
    groups = find_groups(blocks[0], batches[0], shared_input_groups(blocks[0], batches[0]))
    assert groups.is_in_order
    return blocks[0], batches, groups


def inputs_of(block: nn.Module, call: BlockInputs) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with watch_inputs(linears_of(block), found.__setitem__):
        run_block(block, call)
    return found


@torch.no_grad()
@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_stop_is_behind_the_layers_changed_before_it(family: str, hold: bool) -> None:
    block, batches, groups = first_block(family)
    twin = copy.deepcopy(block)
    with PausableBlock(block, groups, hold=range(9) if hold else ()) as pausable:
        for at, group in enumerate(groups.names):
            for number, call in enumerate(batches):
                found = pausable.inputs_of(at, number, lambda call=call: call)
                assert torch.equal(found.inputs, inputs_of(twin, call)[group[0]])
                for name, stream in found.residuals.items():
                    assert groups.residuals[name] == BLOCK_INPUT or stream is not call.hidden_BTD
            for module in (block, twin):
                for name in group:
                    linears_of(module)[name].weight.mul_(0.5)
        for number, call in enumerate(batches):
            output = pausable.finish(number, lambda call=call: call)
            assert torch.equal(output, run_block(twin, call))
    assert not any(thread.name == "held forward" for thread in threading.enumerate())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in block.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "OPT", "Qwen3"])
def test_streams_are_what_the_layers_are_added_to(family: str) -> None:
    block, batches, groups = first_block(family)
    attention, mlp = groups.names[1][0], groups.names[-1][0]
    assert list(groups.residuals) == [attention, mlp]
    outputs: dict[str, Tensor] = {}
    for name in (attention, mlp):
        linears_of(block)[name].register_forward_hook(
            lambda _, __, out, name=name: outputs.update({name: out})
        )
    result = run_block(block, batches[0])
    with PausableBlock(block, groups, hold=range(9)) as pausable:
        passed = [pausable.inputs_of(at, 0, lambda: batches[0]) for at in range(len(groups.names))]
        before, between = passed[1].residuals[attention], passed[-1].residuals[mlp]
        assert torch.equal(before, batches[0].hidden_BTD)
        assert torch.equal(between, before + outputs[attention].view_as(before))
        assert torch.equal(between + outputs[mlp].view_as(between), result)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_passing_a_block_shows_what_stopping_in_it_does(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the outputs of the layers that write, without computing any layer twice for them."""
    block, batches, groups = first_block(family)
    expected: dict[str, Tensor] = {}
    with watch_outputs(linears_of(block), expected.__setitem__):
        result = run_block(block, batches[0])
    with PausableBlock(block, groups, hold=()) as pausable:
        there = [pausable.inputs_of(i, 0, lambda: batches[0]) for i in range(len(groups.names))]
    calls: list[Tensor] = []
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, *rest: calls.append(x) or linear(x, *rest)
    )
    passed, output = run_groups(block, groups, batches[0], with_outputs=True)
    assert len(calls) == len(linears_of(block))
    assert output is not None and torch.equal(output, result)
    assert len(passed) == len(there) and len(groups.residuals) == 2
    for found, other, group in zip(passed, there, groups.names, strict=True):
        assert found.inputs.shape == other.inputs.shape
        if not set(group) <= set(groups.residuals):
            assert torch.equal(found.inputs, other.inputs)
        assert set(found.outputs) == set(found.residuals) == set(group) & set(groups.residuals)
        for name, stream in other.residuals.items():
            assert torch.equal(found.residuals[name], stream)
            assert torch.equal(found.outputs[name], expected[name])
    plain, _ = run_groups(block, groups, batches[0], with_outputs=False)
    for found, other in zip(plain, there, strict=True):
        assert torch.equal(found.inputs, other.inputs) and not found.outputs


@torch.no_grad()
@pytest.mark.parametrize("with_outputs", [True, False])
def test_passing_a_block_ends_behind_what_is_wanted(with_outputs: bool) -> None:
    block, batches, groups = first_block("Llama")
    for last, group in enumerate(groups.names):
        called: list[str] = []
        with watch_inputs(linears_of(block), lambda name, _, to=called: to.append(name)):
            passed, output = run_groups(
                block, groups, batches[0], with_outputs=with_outputs, last=last
            )
        assert output is None and len(passed) == last + 1
        assert called == [name for group in groups.names[:last] for name in group] + group[:1]
        assert set(passed[last].outputs) == (
            set(groups.residuals) & set(group) if with_outputs else set()
        )


@torch.no_grad()
def test_a_forward_that_fails_while_held_says_so_to_its_caller() -> None:
    block, batches, groups = first_block("Llama")
    with PausableBlock(block, groups, hold=range(9)) as pausable:
        pausable.inputs_of(0, 0, lambda: batches[0])
        pausable.inputs_of(0, 1, lambda: batches[1])
        linears_of(block)[groups.names[1][0]].weight.data = torch.zeros(2, 2)
        pausable.inputs_of(1, 0, lambda: batches[0])
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            pausable.inputs_of(2, 0, lambda: batches[0])
    assert not any(thread.name == "held forward" for thread in threading.enumerate())


@torch.no_grad()
@pytest.mark.parametrize("hold", [True, False])
def test_a_layer_that_a_batch_does_not_reach_is_named(hold: bool) -> None:
    block, batches, groups = first_block("Llama")
    block.mlp.forward = lambda x: x  # type: ignore[method-assign, assignment, union-attr]
    with PausableBlock(block, groups, hold=range(9) if hold else ()) as pausable:
        for at in (0, 1):
            pausable.inputs_of(at, 0, lambda: batches[0])
        with pytest.raises(InputError, match=r"layer mlp.gate_proj .* use prune.order=block"):
            pausable.inputs_of(2, 0, lambda: batches[0])
    with pytest.raises(InputError, match=r"layer mlp.gate_proj .* use prune.order=block"):
        run_groups(block, groups, batches[0], with_outputs=True)


@torch.no_grad()
def test_experts_and_layers_called_twice_have_no_stages() -> None:
    class Experts(nn.Module):
        def __init__(self, calls: int) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.calls = calls

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.calls):
                x = self.first(x)
            return x + self.experts[0](x) + self.experts[1](x)

    call = BlockInputs(torch.randn(2, 3, 4), (), {})
    for calls, left_out in ((1, []), (2, ["experts.0", "experts.1"])):
        block = Experts(calls)
        groups = shared_input_groups(block, call, left_out)
        assert not find_groups(block, call, groups).is_in_order
    block = Experts(1)
    groups = shared_input_groups(block, call, ["experts.0", "experts.1"])
    assert find_groups(block, call, groups) == LayerGroups([["first"]], {})


def store_of(hold: bool) -> HiddenStateStore:
    return HiddenStateStore("device" if hold else "host", "cpu", None)


def halve(found: dict[str, Tensor]) -> Callable[[Layer], None]:
    """A solver that keeps what it was given and halves every weight."""

    def solve(layer: Layer) -> None:
        found[layer.name] = layer.moments.hessian_II.clone()
        layer.module.weight.data.mul_(0.5)

    return solve


def moment_of(model: nn.Module, layer: nn.Module, rows: TokenRows) -> Tensor:
    """X^T X / n in float64 of what a layer receives as the model is now."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(0, -2).double())
    )
    model(input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False)
    handle.remove()
    return inputs[0].T @ inputs[0] / len(inputs[0])


@torch.no_grad()
@pytest.mark.parametrize("rows", [token_rows(NUM_ROWS), in_two_documents(token_rows(NUM_ROWS))])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"OPT"}))
def test_hessians_are_those_of_all_layers_before(family: str, rows: TokenRows) -> None:
    """X^T X / n of what a layer receives when every layer before it is solved."""
    model, twin = tiny(family), tiny(family)
    found: dict[str, Tensor] = {}
    walk_blocks(
        BlocksInMemory(model), rows, halve(found), comm=Comm.single(), memory=Memory(4),
        needs=SolverNeeds(order="layer"),
    )  # fmt: skip
    list_name, blocks = find_blocks(twin)
    for index, block in enumerate(blocks):
        for group in FAMILIES[family]:
            expected = moment_of(twin, linears_of(block)[group[0]], rows)
            scale = float(expected.abs().max())
            for name in group:
                hessian = found[f"{list_name}.{index}.{name}"].double()
                # Measured worst 4.0e-7 of the largest entry over all families (float32 sums).
                torch.testing.assert_close(hessian, expected, rtol=0, atol=3e-6 * scale)
                linears_of(block)[name].weight.data.mul_(0.5)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_hessians_of_the_order_dense_are_those_of_the_dense_model(family: str) -> None:
    """X^T X / n of what a layer receives when nothing is solved, from one forward of each block."""
    model, twin, rows = tiny(family), tiny(family), token_rows(NUM_ROWS)
    found: dict[str, Tensor] = {}
    last = linears_of(find_blocks(model)[1][0])[FAMILIES[family][-1][0]]
    calls: list[int] = []
    last.register_forward_hook(lambda _, args, __: calls.append(args[0].numel()))
    walk_blocks(
        BlocksInMemory(model), rows, halve(found), comm=Comm.single(), memory=Memory(4),
        needs=SolverNeeds(order="dense"),
    )  # fmt: skip
    # Behind two probes of half a row, for later tokens, and three of one, to see what calls what.
    assert [size // calls[0] for size in calls] == [1, 1, 2, 2, 2, 6, 6]
    list_name, blocks = find_blocks(twin)
    for index, block in enumerate(blocks):
        for group in FAMILIES[family]:
            expected = moment_of(twin, linears_of(block)[group[0]], rows)
            for name in group:
                hessian = found[f"{list_name}.{index}.{name}"].double()
                # The same bound as above.
                atol = 3e-6 * float(expected.abs().max())
                torch.testing.assert_close(hessian, expected, rtol=0, atol=atol)


def test_the_order_dense_has_no_teacher() -> None:
    with pytest.raises(InputError, match=r"prune.order=dense: twofour .* prune.order=layer"):
        prune_model(
            tiny("Llama"), token_rows(NUM_ROWS), get_method("twofour"), Pattern.parse("2:4"),
            FEW_STEPS, comm=Comm.single(), memory=Memory(2), layers=LayerChoice(order="dense"),
        )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("method", ["sparsegpt", "twofour"])
@pytest.mark.parametrize("family", ["Llama", "Phi", "OPT"])
def test_held_forwards_and_new_ones_give_the_same_bits(family: str, method: str) -> None:
    found = []
    for spare_bytes in (None, 0):
        model = tiny(family)
        result = prune_model(
            model, token_rows(NUM_ROWS), get_method(method), Pattern.parse("2:4"),
            FEW_STEPS, comm=Comm.single(), memory=Memory(2, spare_bytes=spare_bytes),
            layers=LayerChoice(order="layer"),
        )  # fmt: skip
        found.append((model.state_dict(), result))
    (one, first), (other, second) = found
    assert first.layers == second.layers
    assert all(torch.equal(one[name], other[name]) for name in one)


WRITERS = ("o_proj", "down_proj")
SHARES = TargetShares(teacher=0.7, residual=0.3)
either_order = pytest.mark.parametrize(
    ("order", "hold"), [("layer", True), ("layer", False), ("block", True)]
)


def near(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Equal but for the rounding of float32; measured 1.2e-4 of the largest entry at worst."""
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1e-3 * float(scale.abs().max())
    )


def with_biases() -> nn.Module:
    """A Llama whose layers matter, and have biases where they write to the residual stream."""
    model = tiny("Llama")
    generator = torch.Generator().manual_seed(4)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(10)
        if name.endswith(WRITERS):
            module.bias = nn.Parameter(torch.randn(32, generator=generator))
    return model


@torch.no_grad()
@either_order
def test_the_teacher_is_the_dense_model(order: InputOrder, hold: bool) -> None:
    """Nothing changed: dense and pruned inputs are the same, and streams differ by nothing."""
    for shares in (None, SHARES, TargetShares(teacher=0.0, residual=1.0)):
        layers: list[Layer] = []
        walk_blocks(
            BlocksInMemory(with_biases()), token_rows(NUM_ROWS), layers.append, comm=Comm.single(),
            memory=Memory(4), needs=SolverNeeds(teacher=True, target_shares=shares, order=order),
            store=store_of(hold),
        )  # fmt: skip
        assert len(layers) == 3 * 7
        for layer in layers:
            moments, wanted_OI = layer.moments, layer.wanted_OI
            if shares is not None and layer.name.endswith(WRITERS):
                assert moments.cross_II is None and wanted_OI is not None
                expected_OI = shares.teacher * layer.module.weight @ moments.hessian_II
                torch.testing.assert_close(wanted_OI, expected_OI, rtol=1e-5, atol=1e-6)
            else:
                cross_II = moments.cross_II
                assert wanted_OI is None and cross_II is not None
                torch.testing.assert_close(cross_II, moments.hessian_II, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@either_order
@pytest.mark.parametrize("is_weighted", [False, True])
def test_moments_and_targets_are_those_of_both_models(
    order: InputOrder, hold: bool, is_weighted: bool
) -> None:
    """H, G = mean y x^T and C = mean (r' - r) x^T of whole forwards of two models, in float64.

    A layer that writes has P = a W G + b C, and every layer the target
    T = W + [a W (G - H) + b C] H_l^-1, with b = 0 for those that do not write.
    """
    model, dense, twin = with_biases(), with_biases(), with_biases()
    rows = token_rows(NUM_ROWS)
    weights = None
    if is_weighted:
        weights = torch.rand(3, NUM_ROWS, 16, generator=torch.Generator().manual_seed(5)) + 0.1
    params = PruneParams(teacher_share=SHARES.teacher, residual_share=SHARES.residual)
    found: dict[str, tuple[Layer, Tensor]] = {}

    def solve(layer: Layer) -> None:
        problem = Problem(layer.name, layer.module.weight, layer.moments, layer.wanted_OI)
        found[layer.name] = layer, teacher_target(problem, params)
        layer.module.weight.data.mul_(0.5)

    walk_blocks(
        BlocksInMemory(model), rows, solve, comm=Comm.single(), memory=Memory(4),
        needs=SolverNeeds(
            teacher=True, target_shares=SHARES, order=order, token_weights=weights
        ),
        store=store_of(hold),
    )  # fmt: skip

    def seen(of: nn.Module, index: int, name: str) -> tuple[Tensor, Tensor]:
        """The layer's input, and the block's stream before attention or before the MLP."""
        block, noted = find_blocks(of)[1][index], {}
        norm = "input_layernorm" if name.startswith("self_attn") else "post_attention_layernorm"
        for key, module in (("x", block.get_submodule(name)), ("r", block.get_submodule(norm))):
            module.register_forward_pre_hook(
                lambda _, args, key=key: noted.update({key: args[0].flatten(0, -2).double()})
            )
        of(input_ids=rows.ids_NT, use_cache=False)
        for module in of.modules():
            module._forward_pre_hooks.clear()
        return noted["x"], noted["r"]

    def check(index: int, name: str, x: Tensor, r: Tensor) -> None:
        y, dense_r = seen(dense, index, name)
        weight = linears_of(find_blocks(dense)[1][index])[name].weight.double()
        w = torch.ones(len(x)).double() if weights is None else weights[index].flatten().double()
        hessian, cross, residual = (
            (w[:, None] * left).T @ x / w.sum() for left in (x, y, dense_r - r)
        )
        layer, target = found[f"model.layers.{index}.{name}"]
        pull = SHARES.teacher * weight @ (cross - hessian)
        if name.endswith(WRITERS):
            assert layer.moments.cross_II is None and layer.wanted_OI is not None
            pull = pull + SHARES.residual * residual
            expected = SHARES.teacher * weight @ cross + SHARES.residual * residual
            near(layer.wanted_OI, expected, expected)
        else:
            assert layer.moments.cross_II is not None and layer.wanted_OI is None
            near(layer.moments.cross_II, cross, cross)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        trust = shrinkage(len(x), len(hessian))
        move = trust * torch.linalg.solve(damped, pull.T).T
        near(target, weight + move, weight)

    for index, block in enumerate(find_blocks(twin)[1]):
        linears = linears_of(block)
        inputs = {name: seen(twin, index, name) for name in linears} if order == "block" else {}
        for group in FAMILIES["Llama"]:
            for name in group:
                check(index, name, *(inputs.get(name) or seen(twin, index, name)))
            for name in group:
                linears[name].weight.data.mul_(0.5)


class SharedInput(nn.Module):
    """`first` writes and shares its input; the output of `third` is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 6)
        self.third = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        normal = x.tanh()
        x, second = x + self.first(normal), self.second(normal)
        third = self.third(second.relu())
        third += x
        return third


def products(left: Tensor, x: Tensor) -> Tensor:
    return left.flatten(0, -2).T @ x.flatten(0, -2) / left[..., 0].numel()


@torch.no_grad()
@pytest.mark.parametrize("hold", [True, False])
def test_a_layer_that_writes_and_shares_its_input_has_both(hold: bool) -> None:
    torch.manual_seed(0)
    block = SharedInput()
    mine, dense = (BlockInputs(torch.randn(2, 30, 4), (), {}) for _ in range(2))
    groups = find_groups(block, mine, shared_input_groups(block, mine))
    assert groups == LayerGroups(
        [["first", "second"], ["third"]], {"first": BLOCK_INPUT, "third": 0}
    )
    at_once = MomentSums(block, groups.names, True, SHARES, groups.residuals)
    at_once.add_pair(mine, dense, None)
    one = at_once.reduce(Comm.single())
    means, wanted = {}, {}
    with PausableBlock(block, groups, hold=range(9) if hold else ()) as pruned:
        for at, group in enumerate(groups.names):
            sums = MomentSums(block, [group], True, SHARES, groups.residuals)
            here = pruned.inputs_of(at, 0, lambda: mine)
            there, _ = run_groups(
                block, groups, dense, with_outputs=True, last=None if hold else at
            )
            sums.add_group(here, there[at], None)
            found = sums.reduce(Comm.single())
            means.update(found.moments)
            wanted.update(found.wanted)
    x, y = mine.hidden_BTD, dense.hidden_BTD
    gap = SHARES.residual * (y - x)
    first = products(SHARES.teacher * y.tanh() @ block.first.weight.T + gap, x.tanh())
    inner_x, inner_y = (block.second(v.tanh()).relu() for v in (x, y))
    gap = SHARES.residual * (y + block.first(y.tanh()) - x - block.first(x.tanh()))
    third = products(SHARES.teacher * inner_y @ block.third.weight.T + gap, inner_x)
    for some, products_OI in ((one.moments, one.wanted), (means, wanted)):
        cross = some["first"].cross_II
        assert cross is not None and some["third"].cross_II is None
        torch.testing.assert_close(cross, products(y.tanh(), x.tanh()))
        assert set(products_OI) == {"first", "third"}
        torch.testing.assert_close(products_OI["first"], first)
        torch.testing.assert_close(products_OI["third"], third)


@torch.no_grad()
def test_experts_with_other_tokens_have_no_product_and_the_rest_of_the_block_has() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(4, 4)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x.tanh())
            result = x.clone()
            for at, expert in enumerate(self.experts):
                mine = (x[..., 0] > 0) == bool(at)
                result[mine] += expert(x[mine])
            return result

    torch.manual_seed(0)
    block = Experts()
    mine, dense = (BlockInputs(torch.randn(2, 30, 4), (), {}) for _ in range(2))
    groups = find_groups(block, mine, shared_input_groups(block, mine))
    assert not groups.is_in_order and groups.residuals["attention"] == BLOCK_INPUT
    moments = MomentSums(block, groups.names, True, SHARES, groups.residuals)
    moments.add_pair(mine, dense, None)
    found = moments.reduce(Comm.single())
    assert set(found.wanted) == {"attention"}
    assert all(moments.cross_II is None for moments in found.moments.values())
    x, y = mine.hidden_BTD, dense.hidden_BTD
    left = SHARES.teacher * y.tanh() @ block.attention.weight.T + SHARES.residual * (y - x)
    torch.testing.assert_close(found.wanted["attention"], products(left, x.tanh()))


@torch.no_grad()
def test_a_layer_that_writes_twice_has_the_cross_moment() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + self.layer(x.tanh())
            return x

    torch.manual_seed(0)
    block = Twice()
    mine, dense = (BlockInputs(torch.randn(2, 30, 4), (), {}) for _ in range(2))
    groups = find_groups(block, mine, shared_input_groups(block, mine))
    assert groups == LayerGroups([["layer"]], {}, is_in_order=False)
    moments = MomentSums(block, groups.names, True, SHARES, groups.residuals)
    moments.add_pair(mine, dense, None)
    found = moments.reduce(Comm.single())
    inputs = []
    for x in (mine.hidden_BTD, dense.hidden_BTD):
        inputs.append(torch.cat([x, x + block.layer(x.tanh())]).tanh())
    cross = found.moments["layer"].cross_II
    assert not found.wanted and cross is not None
    torch.testing.assert_close(cross, products(inputs[1], inputs[0]))


def test_bad_activations_name_layer_and_rows_and_leave_nothing_running() -> None:
    model = tiny("Llama")
    rows = token_rows(NUM_ROWS)
    model.get_input_embeddings().weight.data[rows.ids_NT[4, 3]] = torch.inf
    with pytest.raises(
        NonFiniteError, match=r"block 0, layer .*q_proj.*; first in calibration rows"
    ):
        walk_blocks(
            BlocksInMemory(model), rows, lambda _: None, comm=Comm.single(), memory=Memory(2),
            needs=SolverNeeds(teacher=True, order="layer"), store=store_of(True),
        )  # fmt: skip
    assert not any(thread.name == "held forward" for thread in threading.enumerate())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Phi", "OPT"])
def test_measuring_a_block_at_once_ends_at_its_last_layer(family: str) -> None:
    """What nobody needs is not computed: that layer runs once per batch, when the rows go on."""
    model = tiny(family)
    _, blocks = find_blocks(model)
    last = FAMILIES[family][-1][-1]
    calls = [0] * len(blocks)

    def count(index: int) -> None:
        calls[index] += 1

    for index, block in enumerate(blocks):
        layer = linears_of(block)[last]
        layer.register_forward_hook(lambda *_, index=index: count(index))
    found: dict[str, Tensor] = {}
    walk_blocks(
        BlocksInMemory(model), token_rows(NUM_ROWS), halve(found), comm=Comm.single(),
        memory=Memory(4), needs=SolverNeeds(order="block"),
    )  # fmt: skip
    num_batches = -(-NUM_ROWS // 4)
    num_looks = 2  # at one row: which layers share an input, and in which order they come
    num_first = 3  # what the first block returns, and twice whether it sees later tokens
    assert calls == [num_first + num_looks + num_batches, num_looks + num_batches, num_looks]
    assert len(found) == len(blocks) * len(linears_of(blocks[0]))
