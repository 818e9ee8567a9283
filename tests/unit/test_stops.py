"""Forwards that stop before a block's layers, and the walk that measures layer by layer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify.calibrate import Layer, Wants, walk_blocks
from sparsify.comm import Comm
from sparsify.errors import InputError, NonFiniteError
from sparsify.methods import PruneParams, get_method
from sparsify.models.blocks import BlocksInMemory
from sparsify.models.stops import BLOCK_INPUT, Stages, StoppingBlock, stages_of
from sparsify.models.structure import (
    BlockCalls,
    BlockInputs,
    find_blocks,
    linears_of,
    run_block,
    shared_input_groups,
    watch_linears,
)
from sparsify.pattern import Pattern
from sparsify.prune import prune_model
from sparsify.streams import StreamStore
from sparsify.text import TokenRows
from tests.families import FAMILIES, in_two_documents, tiny, token_rows

NUM_ROWS = 6


def first_block(family: str) -> tuple[nn.Module, list[BlockInputs], Stages]:
    """A block, its calls for three batches, and its stages."""
    model = tiny(family)
    blocks = find_blocks(model)[1]
    calls = BlockCalls(model, blocks)
    rows = token_rows(NUM_ROWS)
    batches = [calls.first(rows[start : start + 2]) for start in range(0, NUM_ROWS, 2)]
    stages = stages_of(blocks[0], batches[0], shared_input_groups(blocks[0], batches[0]))
    assert stages is not None
    return blocks[0], batches, stages


def inputs_of(block: nn.Module, call: BlockInputs) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with watch_linears(linears_of(block), found.__setitem__):
        run_block(block, call)
    return found


@torch.no_grad()
@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_stop_is_behind_the_layers_changed_before_it(family: str, hold: bool) -> None:
    block, batches, stages = first_block(family)
    twin = copy.deepcopy(block)
    with StoppingBlock(block, stages, hold=hold) as stopping:
        for stage, group in enumerate(stages.groups):
            for number, call in enumerate(batches):
                stop = stopping.stop_at(stage, number, lambda call=call: call)
                assert torch.equal(stop.inputs, inputs_of(twin, call)[group[0]])
                for name, stream in stop.streams.items():
                    assert stages.streams[name] == BLOCK_INPUT or stream is not call.hidden_BTD
            for module in (block, twin):
                for name in group:
                    linears_of(module)[name].weight.mul_(0.5)
        for number, call in enumerate(batches):
            output = stopping.end(number, lambda call=call: call)
            assert torch.equal(output, run_block(twin, call))
    assert not any(thread.name == "held forward" for thread in threading.enumerate())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in block.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "OPT", "Qwen3"])
def test_streams_are_what_the_layers_are_added_to(family: str) -> None:
    block, batches, stages = first_block(family)
    attention, mlp = stages.groups[1][0], stages.groups[-1][0]
    assert list(stages.streams) == [attention, mlp]
    outputs: dict[str, Tensor] = {}
    for name in (attention, mlp):
        linears_of(block)[name].register_forward_hook(
            lambda _, __, out, name=name: outputs.update({name: out})
        )
    result = run_block(block, batches[0])
    with StoppingBlock(block, stages, hold=True) as stopping:
        stops = [
            stopping.stop_at(stage, 0, lambda: batches[0]) for stage in range(len(stages.groups))
        ]
        before, between = stops[1].streams[attention], stops[-1].streams[mlp]
        assert torch.equal(before, batches[0].hidden_BTD)
        assert torch.equal(between, before + outputs[attention].view_as(before))
        assert torch.equal(between + outputs[mlp].view_as(between), result)


@torch.no_grad()
def test_a_forward_that_fails_while_held_says_so_to_its_caller() -> None:
    block, batches, stages = first_block("Llama")
    with StoppingBlock(block, stages, hold=True) as stopping:
        stopping.stop_at(0, 0, lambda: batches[0])
        stopping.stop_at(0, 1, lambda: batches[1])
        linears_of(block)[stages.groups[1][0]].weight.data = torch.zeros(2, 2)
        stopping.stop_at(1, 0, lambda: batches[0])
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            stopping.stop_at(2, 0, lambda: batches[0])
    assert not any(thread.name == "held forward" for thread in threading.enumerate())


@torch.no_grad()
@pytest.mark.parametrize("hold", [True, False])
def test_a_layer_that_a_batch_does_not_reach_is_named(hold: bool) -> None:
    block, batches, stages = first_block("Llama")
    block.mlp.forward = lambda x: x  # type: ignore[method-assign, assignment, union-attr]
    with StoppingBlock(block, stages, hold=hold) as stopping:
        for stage in (0, 1):
            stopping.stop_at(stage, 0, lambda: batches[0])
        with pytest.raises(InputError, match=r"layer mlp.gate_proj .* use prune.order=block"):
            stopping.stop_at(2, 0, lambda: batches[0])


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
        assert stages_of(block, call, groups) is None
    block = Experts(1)
    groups = shared_input_groups(block, call, ["experts.0", "experts.1"])
    assert stages_of(block, call, groups) == Stages([["first"]], {})


def store_of(hold: bool) -> StreamStore:
    return StreamStore("device" if hold else "host", "cpu", None)


def halve(found: dict[str, Tensor]) -> Callable[[Layer], None]:
    """A solver that keeps what it was given and halves every weight."""

    def solve(layer: Layer) -> None:
        found[layer.name] = layer.statistics.hessian_II.clone()
        layer.module.weight.data.mul_(0.5)

    return solve


@torch.no_grad()
@pytest.mark.parametrize("rows", [token_rows(NUM_ROWS), in_two_documents(token_rows(NUM_ROWS))])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"OPT"}))
def test_hessians_are_those_of_all_layers_before(family: str, rows: TokenRows) -> None:
    """X^T X / n of what a layer receives when every layer before it is solved."""
    model, twin = tiny(family), tiny(family)
    found: dict[str, Tensor] = {}
    walk_blocks(
        BlocksInMemory(model), rows, halve(found), comm=Comm.single(), batch_size=4,
        wants=Wants(order="layer"),
    )  # fmt: skip
    list_name, blocks = find_blocks(twin)
    for index, block in enumerate(blocks):
        for group in FAMILIES[family]:
            inputs: list[Tensor] = []
            handle = linears_of(block)[group[0]].register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2).double())
            )
            twin(input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False)
            handle.remove()
            expected = inputs[0].T @ inputs[0] / len(inputs[0])
            scale = float(expected.abs().max())
            for name in group:
                hessian = found[f"{list_name}.{index}.{name}"].double()
                # Measured worst 4.0e-7 of the largest entry over all families (float32 sums).
                torch.testing.assert_close(hessian, expected, rtol=0, atol=3e-6 * scale)
                linears_of(block)[name].weight.data.mul_(0.5)


@torch.no_grad()
@pytest.mark.parametrize("method", ["sparsegpt", "twofour"])
@pytest.mark.parametrize("family", ["Llama", "Phi", "OPT"])
def test_held_forwards_and_new_ones_give_the_same_bits(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for hold in (True, False):
        monkeypatch.setattr(StreamStore, "is_on_device", property(lambda _, hold=hold: hold))
        model = tiny(family)
        result = prune_model(
            model, token_rows(NUM_ROWS), get_method(method), Pattern.parse("2:4"),
            PruneParams(block_size=16), comm=Comm.single(), batch_size=2, order="layer",
        )  # fmt: skip
        found.append((model.state_dict(), result))
    (one, first), (other, second) = found
    assert first.layers == second.layers
    assert all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_the_teacher_is_the_dense_model() -> None:
    """Nothing changed: dense and pruned inputs are the same, and streams differ by nothing."""
    layers: list[Layer] = []
    walk_blocks(
        BlocksInMemory(tiny("Llama")), token_rows(NUM_ROWS), layers.append, comm=Comm.single(),
        batch_size=4, wants=Wants(teacher=True, order="layer"),
    )  # fmt: skip
    assert len(layers) == 3 * 7
    for layer in layers:
        statistics = layer.statistics
        assert statistics.cross_II is not None
        torch.testing.assert_close(statistics.cross_II, statistics.hessian_II, rtol=1e-5, atol=1e-6)
        if layer.name.endswith(("o_proj", "down_proj")):
            assert layer.residual_OI is not None and not layer.residual_OI.any()
        else:
            assert layer.residual_OI is None


@torch.no_grad()
def test_moments_with_a_teacher_are_those_of_both_models() -> None:
    """G = mean y x^T and C = mean (r' - r) x^T of each layer, from whole forwards of two models."""
    model, dense, twin = tiny("Llama"), tiny("Llama"), tiny("Llama")
    rows = token_rows(NUM_ROWS)
    found: dict[str, tuple[Tensor, Tensor | None]] = {}

    def solve(layer: Layer) -> None:
        assert layer.statistics.cross_II is not None
        found[layer.name] = layer.statistics.cross_II, layer.residual_OI
        layer.module.weight.data.mul_(0.5)

    walk_blocks(
        BlocksInMemory(model), rows, solve, comm=Comm.single(), batch_size=4,
        wants=Wants(teacher=True, order="layer"),
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

    for index, block in enumerate(find_blocks(twin)[1]):
        for group in FAMILIES["Llama"]:
            (x, r), (y, dense_r) = (seen(of, index, group[0]) for of in (twin, dense))
            cross, residual = found[f"model.layers.{index}.{group[-1]}"]
            torch.testing.assert_close(cross.double(), y.T @ x / len(x), rtol=1e-4, atol=1e-6)
            if residual is not None:
                expected = (dense_r - r).T @ x / len(x)
                torch.testing.assert_close(residual.double(), expected, rtol=1e-4, atol=1e-6)
            for name in group:
                linears_of(block)[name].weight.data.mul_(0.5)


def test_bad_activations_name_layer_and_rows_and_leave_nothing_running() -> None:
    model = tiny("Llama")
    rows = token_rows(NUM_ROWS)
    model.get_input_embeddings().weight.data[rows.ids_NT[4, 3]] = torch.inf
    with pytest.raises(
        NonFiniteError, match=r"block 0, layer .*q_proj.*; first in calibration rows"
    ):
        walk_blocks(
            BlocksInMemory(model), rows, lambda _: None, comm=Comm.single(), batch_size=2,
            wants=Wants(teacher=True, order="layer"), store=store_of(True),
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
        batch_size=4, wants=Wants(order="block"),
    )  # fmt: skip
    num_batches = -(-NUM_ROWS // 4)
    num_looks = 2  # at one row: which layers share an input, and in which order they come
    assert calls == [1 + num_looks + num_batches, num_looks + num_batches, num_looks]
    assert len(found) == len(blocks) * len(linears_of(blocks[0]))
