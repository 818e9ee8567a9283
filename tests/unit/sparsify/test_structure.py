"""Finding blocks, their calls and their shared inputs on tiny models of nine families."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.layers import SolverNeeds, prunable_linears
from sparsify.calibration.walk import walk_blocks
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import CalibrationError, InputError, NonFiniteError
from sparsify.masks.select import find_violation
from sparsify.methods import PruneParams, available_methods, get_method
from sparsify.models.blocks import BlocksInMemory
from sparsify.models.calls import BlockCalls, BlockInputs, run_block
from sparsify.models.structure import find_blocks, linears_of, writers_of
from sparsify.models.watch import ResidualAdds, shared_input_groups, watch_outputs
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, prune_model
from tests.families import FAMILIES, FEW_STEPS, in_two_documents, tiny, token_rows


def calls_of(model: nn.Module) -> BlockCalls:
    calls = BlockCalls(model, find_blocks(model)[1])
    calls.learn(find_blocks(model)[1][0], token_rows(1))
    return calls


def first_call(model: nn.Module, rows: TokenRows) -> BlockInputs:
    return calls_of(model).first(rows)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_blocks_run_one_by_one_equal_the_whole_model(family: str) -> None:
    model = tiny(family)
    name, blocks = find_blocks(model)
    assert len(blocks) == 3 and model.get_submodule(name) is blocks
    batches = [token_rows(4, seed=2), in_two_documents(token_rows(4, seed=3))]
    calls = calls_of(model)
    for batch in batches:
        seen: list[torch.Tensor] = []
        handle = blocks[-1].register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        model(input_ids=batch.ids_NT, position_ids=batch.positions_NT, use_cache=False)
        handle.remove()
        hidden = calls.first(batch).hidden_BTD
        for index, block in enumerate(blocks):
            hidden = run_block(block, calls.call(index, batch, hidden))
        assert torch.equal(hidden, seen[0])


@torch.no_grad()
def test_calls_need_no_weights_of_the_blocks_before() -> None:
    model, twin = tiny("Gemma2"), tiny("Gemma2")
    rows = token_rows(2)
    calls, hidden = calls_of(model), torch.randn(2, 16, 32)
    expected = calls_of(twin).call(2, rows, hidden)
    find_blocks(model)[1][0].to("meta")
    find_blocks(model)[1][1].to("meta")
    found = calls.call(2, rows, hidden)
    assert found.hidden_BTD is hidden
    assert torch.equal(found.kwargs["attention_mask"], expected.kwargs["attention_mask"])


def test_blocks_of_gemma2_get_their_own_masks() -> None:
    model = tiny("Gemma2")
    rows, calls = token_rows(2), calls_of(model)
    hidden = calls.first(rows).hidden_BTD
    sliding, full = (calls.call(i, rows, hidden).kwargs["attention_mask"] for i in (0, 1))
    assert not torch.equal(sliding, full)


WRITERS = {
    "Gemma2": [],  # normalises what attention and MLP return before it adds
    "Phi": [],  # adds attention and MLP to each other first
    "OPT": ["self_attn.out_proj", "fc2"],
}


@torch.no_grad()
def test_residual_adds_are_seen(family: str) -> None:
    model = tiny(family)
    blocks = find_blocks(model)[1]
    call = first_call(model, token_rows(2))
    adds, outputs = ResidualAdds(), {}

    def note(name: str, output: torch.Tensor) -> None:
        outputs[name] = output
        adds.saw(name, output)

    with watch_outputs(writers_of(linears_of(blocks[0]), 32), note), adds:
        result = run_block(blocks[0], call)
    seen = dict(adds.onto)
    expected = WRITERS.get(family, ["self_attn.o_proj", "mlp.down_proj"])
    assert list(seen) == expected
    if expected:
        attention, mlp = expected
        assert torch.equal(seen[attention], call.hidden_BTD)
        # OPT adds to its MLP's output with rows and tokens in one dimension.
        middle = seen[attention] + outputs[attention]
        assert torch.equal(middle, seen[mlp].view_as(middle))
        assert torch.equal((seen[mlp] + outputs[mlp]).view_as(result), result)


@torch.no_grad()
def test_groups_share_their_input(family: str) -> None:
    model = tiny(family)
    _, blocks = find_blocks(model)
    assert shared_input_groups(blocks[0], first_call(model, token_rows(2))) == FAMILIES[family]


def test_hooks_are_gone_afterwards(family: str) -> None:
    model = tiny(family)
    _, blocks = find_blocks(model)
    with torch.no_grad():
        call = first_call(model, token_rows(2))
        calls_of(model).call(2, token_rows(2), call.hidden_BTD)
        shared_input_groups(blocks[0], call)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_every_method_prunes_every_family(family: str) -> None:
    pattern = Pattern.parse("2:4")
    for method in available_methods().values():
        model = tiny(family)
        before = {name: p.clone() for name, p in model.named_parameters()}
        progress: list[tuple[int, int]] = []
        result = prune_model(
            model, token_rows(10), method, pattern, FEW_STEPS, comm=Comm.single(),
            memory=Memory(4), on_block=lambda *step, seen=progress: seen.append(step),
        )  # fmt: skip
        assert progress == [(1, 3), (2, 3), (3, 3)]
        assert [report.name for report in result.layers] == list(result.keep_masks)
        assert set(result.keep_masks) == {name for _, name, _ in prunable_linears(model)}
        for name, parameter in model.named_parameters():
            layer = name.removesuffix(".weight")
            if layer in result.keep_masks:
                assert find_violation(parameter, pattern) is None
                assert result.keep_masks[layer].float().mean() == 0.5
                assert not parameter[~result.keep_masks[layer]].any()
            else:
                assert torch.equal(parameter, before[name]), f"{name} is not to be pruned"
        for report in result.layers:
            assert report.num_tokens == 160 and 0 < report.relative_error < 1
            assert report.sparsity == 0.5


@torch.no_grad()
def test_hessians_are_those_of_the_pruned_prefix(family: str) -> None:
    """Each layer's Hessian is X^T X / n of what the layer receives once all before are pruned.

    The solver halves every weight, so that a walk that did not propagate would be found out.
    """
    model, twin = tiny(family), tiny(family)
    rows = token_rows(6)
    found: dict[str, torch.Tensor] = {}

    def solve(layer) -> None:  # type: ignore[no-untyped-def]
        found[layer.name] = layer.moments.hessian_II
        layer.module.weight.data.mul_(0.5)

    walk_blocks(
        BlocksInMemory(model), rows, solve, comm=Comm.single(), memory=Memory(4),
        needs=SolverNeeds(),
    )  # fmt: skip
    list_name, blocks = find_blocks(twin)
    for index, block in enumerate(blocks):
        inputs: dict[str, torch.Tensor] = {}
        handles = [
            linear.register_forward_pre_hook(
                lambda _, args, name=name, to=inputs: to.update({name: args[0].clone()})
            )
            for name, linear in linears_of(block).items()
        ]
        twin(input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False)
        for handle in handles:
            handle.remove()
        for name, linear in linears_of(block).items():
            x = inputs[name].reshape(-1, linear.in_features).double()
            hessian = found[f"{list_name}.{index}.{name}"].double()
            # Measured worst 3.4e-7 of the largest entry over all families (float32 sums).
            scale = float(hessian.abs().max())
            torch.testing.assert_close(hessian, x.T @ x / len(x), rtol=0, atol=3e-6 * scale)
            linear.weight.data.mul_(0.5)


def test_layers_that_share_an_input_share_the_hessian() -> None:
    seen: dict[str, torch.Tensor | None] = {}
    walk_blocks(
        BlocksInMemory(tiny("Llama", 1)), token_rows(2),
        lambda layer: seen.update({layer.name: layer.moments.hessian_II}), comm=Comm.single(),
        memory=Memory(2), needs=SolverNeeds(),
    )  # fmt: skip
    prefix = "model.layers.0.self_attn."
    assert seen[prefix + "q_proj"] is seen[prefix + "v_proj"]
    assert seen[prefix + "q_proj"] is not seen[prefix + "o_proj"]


def test_walk_restores_training_mode() -> None:
    model = tiny("Llama").train()
    walk_blocks(
        BlocksInMemory(model), token_rows(2), lambda _: None, comm=Comm.single(), memory=Memory(2),
        needs=SolverNeeds(),
    )  # fmt: skip
    assert model.training and all(module.training for module in model.modules())


def test_experts_inside_blocks_are_not_taken_for_the_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(8))

    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(2))
    assert find_blocks(model)[0] == "layers"


def test_model_without_linear_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="no list of equal blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_uncalled_linear_is_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.used(hidden)

    block = Block()
    inputs = SimpleNamespace(hidden_BTD=torch.ones(1, 2, 4), args=(), kwargs={})
    with pytest.raises(InputError, match="idle of a Block are never called"):
        shared_input_groups(block, inputs)  # type: ignore[arg-type]
    assert shared_input_groups(block, inputs, ["idle"]) == [["used"]]  # type: ignore[arg-type]


def test_input_changed_in_place_is_another_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            value = hidden.clone()
            out = self.first(value)
            return out + self.second(value.mul_(2))

    inputs = SimpleNamespace(hidden_BTD=torch.ones(1, 2, 4), args=(), kwargs={})
    with torch.no_grad():
        groups = shared_input_groups(Block(), inputs)  # type: ignore[arg-type]
    assert groups == [["first"], ["second"]]


def test_something_between_blocks_is_refused() -> None:
    model = tiny("Llama")
    blocks = find_blocks(model)[1]
    blocks[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    with pytest.raises(InputError, match="block 1 is not called once, on the output"):
        calls_of(model)


def test_skip_leaves_layers_dense_and_must_match() -> None:
    model = tiny("Llama")
    everything = len(prunable_linears(model))
    assert len(prunable_linears(model, ["*.down_proj"])) == everything - 3
    assert len(prunable_linears(model, ["mlp.down_proj", "model.layers.0.*"])) == everything - 9
    with pytest.raises(InputError, match=r"\*\.lm_head matches no linear layer"):
        prunable_linears(model, ["*.lm_head"])
    with pytest.raises(InputError, match="nothing is left"):
        prunable_linears(model, ["*"])
    result = prune_model(
        model, token_rows(2), get_method("magnitude"), Pattern.parse("2:4"), PruneParams(),
        comm=Comm.single(), memory=Memory(2), layers=LayerChoice(skip=["*.k_proj"]),
    )  # fmt: skip
    assert len(result.keep_masks) == everything - 3
    assert all(
        bool(model.get_parameter(f"model.layers.{i}.self_attn.k_proj.weight").all())
        for i in range(3)
    )


def test_indivisible_layer_is_refused_before_anything_changes() -> None:
    model = tiny("Llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj: 48 input columns"):
        prune_model(
            model, token_rows(2), get_method("magnitude"), Pattern.parse("2:32"), PruneParams(),
            comm=Comm.single(), memory=Memory(2),
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_nan_activation_names_block_and_layer() -> None:
    model = tiny("Llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = float("nan")
    with pytest.raises(NonFiniteError, match=r"block 1, layer model\.layers\.1\.mlp\.down_proj"):
        walk_blocks(
            BlocksInMemory(model), token_rows(2), lambda _: None, comm=Comm.single(),
            memory=Memory(2), needs=SolverNeeds(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), "0 calibration rows for 1 workers"),
        (torch.zeros(8, dtype=torch.int64), "have shape"),
    ],
)
def test_unusable_rows_are_refused(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        walk_blocks(
            BlocksInMemory(tiny("Llama")), TokenRows(rows, rows), lambda _: None,
            comm=Comm.single(), memory=Memory(2), needs=SolverNeeds(),
        )  # fmt: skip


def of_layers(num_hidden_layers: int | None = None, **lists: list[nn.Module]) -> nn.Module:
    """A module with these lists, and the configuration of a model of so many layers."""
    model = nn.Module()
    for name, modules in lists.items():
        setattr(model, name, nn.ModuleList(modules))
    if num_hidden_layers is not None:
        text = SimpleNamespace(num_hidden_layers=num_hidden_layers)
        model.config = SimpleNamespace(get_text_config=lambda: text)  # type: ignore[assignment]
    return model


def linears(number: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 4)) for _ in range(number)]


class Adapted(nn.Module):
    """A block with a list of its own that is longer than the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(linears(9))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            of_layers(3, layers=[*linears(2), Adapted()]),
            r"its blocks layers are of 2 classes \(Adapted, Sequential\)",
        ),
        (
            of_layers(6, encoder=linears(4), decoder=linears(4)),
            r"several lists .*, encoder \(4\), decoder \(4\), and which are its 6 decoder blocks",
        ),
        (
            of_layers(4, attentions=linears(4), ffns=linears(4)),
            r"several lists .*, attentions \(4\), ffns \(4\), and which are its 4 decoder blocks",
        ),
        (
            of_layers(2, layers=[nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.ReLU())]),
            "not all of its blocks layers have nn.Linear layers",
        ),
    ],
)
def test_what_is_no_list_of_decoder_blocks_is_refused(model: nn.Module, said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_blocks(model)


def test_a_deeper_vision_part_is_not_taken_for_the_decoder() -> None:
    assert find_blocks(of_layers(2, vision=linears(5), text=linears(2)))[0] == "text"
    # Where the model says which of its parts decodes, its list it is, whatever its length.
    model = of_layers(7, vision=linears(7))
    model.decoder = of_layers(layers=linears(3))
    model.get_decoder = lambda: model.decoder  # type: ignore[assignment]
    assert find_blocks(model)[0] == "decoder.layers"
