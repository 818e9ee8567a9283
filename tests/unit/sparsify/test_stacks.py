"""Layers of experts put together, from shapes alone, and pruned and quantised as one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.benchmarks.support.families import random_family
from sparsify.calibration import moments, stacks
from sparsify.calibration.block import LoadedBlock
from sparsify.calibration.hessian import InverseFactor
from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.layers import Layer, SolverNeeds
from sparsify.calibration.stacks import stacks_of
from sparsify.calibration.walk import walk_blocks
from sparsify.comm import Comm
from sparsify.errors import InputError, SingularHessianError
from sparsify.methods import Problem, PruneParams, Solution, get_method
from sparsify.methods._base import chosen_mask, selected
from sparsify.methods._target import teacher_target
from sparsify.models import experts
from sparsify.models.blocks import BlocksInMemory
from sparsify.models.structure import find_blocks, linears_of
from sparsify.models.unfuse import unfuse_experts
from sparsify.packed.layer import Codes
from sparsify.params import QuantParams
from sparsify.pattern import Pattern
from sparsify.pruning import one_pass
from sparsify.pruning.one_pass import OnePass
from sparsify.pruning.prune import LayerChoice, PruneResult, prune_checkpoint, prune_model
from sparsify.quantization import gptq, quantize
from sparsify.quantization.codes import Quantized
from sparsify.quantization.quantize import QuantResult, quantize_checkpoint, quantize_model
from sparsify.quantization.weight import KnownInputs
from tests.families import FEW_STEPS, token_rows

PATTERN = Pattern.parse("2:4")


def mixture() -> Any:
    model = random_family("qwen3_moe")
    unfuse_experts(model)
    return model


def stacks_on(device: str) -> tuple[list[list[str]], list[list[list[str]]]]:
    """The groups of a block on a device, and how they are put together."""
    block = find_blocks(mixture())[1][-1].to(device)
    names = list(linears_of(block))
    groups = [[n for n in names if n.endswith(("q_proj", "k_proj", "v_proj"))]]
    for name in names:
        if name.endswith("gate_proj"):
            groups.append([name, name.replace("gate", "up")])
        elif name.endswith(("o_proj", "down_proj")):
            groups.append([name])
    return groups, stacks_of(groups, LoadedBlock(-1, block, linears_of(block), None))


def pruned(method: str, model: Any, is_fixed: bool = False, **options: Any) -> PruneResult:
    return prune_model(
        model, token_rows(16), get_method(method), PATTERN, PruneParams(**options),
        comm=Comm.single(is_fixed), memory=Memory(8),
    )  # fmt: skip


def test_experts_of_one_kind_are_together_and_nothing_else_is() -> None:
    groups, found = stacks_on("meta")
    assert [group for stack in found for group in stack] != groups
    assert sorted(group for stack in found for group in stack) == sorted(groups)
    together = [stack for stack in found if len(stack) > 1]
    assert len(together) == 2 and len(together[0]) == len(together[1]) > 2
    assert all(len({name.split(".")[-1] for name in place}) == 1
               for stack in together for place in zip(*stack, strict=True))  # fmt: skip
    alone = [stack[0] for stack in found if len(stack) == 1]
    assert [len(group) for group in alone] == [3, 1]


def test_a_cpu_has_none() -> None:
    groups, found = stacks_on("cpu")
    assert found == [[group] for group in groups]


def test_stacks_have_even_sizes_within_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, whole = stacks_on("meta")
    num_experts = max(map(len, whole))
    linears = linears_of(find_blocks(mixture())[1][-1])
    wide = linears[next(stack for stack in whole if len(stack) > 1)[0][0]]
    square = 4 * wide.in_features * max(wide.in_features, wide.out_features)
    monkeypatch.setattr(experts, "STACK_BYTES", (num_experts - 1) * square)
    _, cut = stacks_on("meta")
    sizes = [len(stack) for stack in cut if "gate_proj" in stack[0][0]]
    assert sizes == [num_experts // 2, num_experts - num_experts // 2]
    monkeypatch.setattr(experts, "STACK_BYTES", 1)
    assert sorted(stacks_on("meta")[1]) == sorted([group] for group in groups)


@pytest.mark.parametrize(
    ("method", "is_fixed"),
    [("magnitude", False), ("wanda", False), ("sparsegpt", False), ("sparsegpt", True),
     ("twofour", False)],
)  # fmt: skip
def test_a_model_is_pruned_as_one_by_one(
    method: str, is_fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks alike, weights but for rounding: its experts are so small that torch multiplies a
    stack of them by another loop."""
    one, other = mixture(), mixture()
    expected = pruned(method, one, is_fixed, block_size=16)
    monkeypatch.setattr(stacks, "_ALONE", ())  # as if launches were dear on a CPU
    found = pruned(method, other, is_fixed, block_size=16)
    assert found.keep_masks.keys() == expected.keep_masks.keys()
    for name, mask in expected.keep_masks.items():
        assert torch.equal(found.keep_masks[name], mask), name
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
    reports = {report.name: report for report in found.layers}
    for report in expected.layers:
        mine = reports[report.name]
        assert mine.error == pytest.approx(report.error, rel=1e-4)
        assert (mine.keep_mask_sha256, mine.large_kept) == (
            report.keep_mask_sha256, report.large_kept,
        )  # fmt: skip
        assert (mine.num_tokens, mine.num_lent, mine.num_dead_columns, mine.damping) == (
            report.num_tokens, report.num_lent, report.num_dead_columns, report.damping,
        )  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stack_is_factored_once(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    factor = moments.inverse_factors

    def counted(hessian_EII: Tensor, damping: float, names: Sequence[str]) -> list[InverseFactor]:
        seen.extend(names)
        return factor(hessian_EII, damping, names)

    monkeypatch.setattr(moments, "inverse_factors", counted)
    monkeypatch.setattr(stacks, "_ALONE", ())
    prune_model(
        mixture(), token_rows(16), get_method("sparsegpt"), PATTERN, PruneParams(block_size=16),
        comm=Comm.single(), memory=Memory(8, overlap=overlap),
    )  # fmt: skip
    assert seen and len(seen) == len(set(seen))


def test_layers_that_share_an_input_come_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are solved one by one: what is worked out for one serves the next."""
    monkeypatch.setattr(stacks, "_ALONE", ())
    inputs: list[Any] = []
    walk_blocks(
        BlocksInMemory(mixture()), token_rows(16), lambda layer: inputs.append(layer.moments),
        comm=Comm.single(), memory=Memory(8), needs=SolverNeeds(),
    )  # fmt: skip
    runs = [key for key, _ in itertools.groupby(map(id, inputs))]
    assert len(runs) == len(set(runs)) < len(inputs)


def test_a_teachers_target_reaches_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that keeps the largest of the target, which takes stacks."""
    shapes: set[int] = set()

    def solve(problem: Problem, pattern: Pattern, params: PruneParams) -> Solution:
        shapes.add(problem.weight_OI.ndim)
        target_OI = teacher_target(problem, params)
        return selected(target_OI, chosen_mask(target_OI.abs(), problem, pattern))

    method = replace(get_method("twofour"), solve=solve, takes_stacks=True)
    monkeypatch.setattr(f"{__name__}.get_method", lambda _: method)
    one, other = mixture(), mixture()
    expected = pruned("", one)
    assert shapes == {2}
    monkeypatch.setattr(stacks, "_ALONE", ())
    found = pruned("", other)
    assert shapes == {2, 3}
    for name, mask in expected.keep_masks.items():
        assert torch.equal(found.keep_masks[name], mask), name
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_the_one_whose_mask_breaks_the_pattern_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture()
    pruned("magnitude", model)
    name = next(n for n in linears_of(find_blocks(model)[1][0]) if n.endswith("2.up_proj"))
    with torch.no_grad():
        find_blocks(model)[1][0].get_submodule(name).weight[3, 4:8] = 1.0
    monkeypatch.setattr(stacks, "_ALONE", ())
    words = rf"layers\.0\.{name}: the given mask breaks pattern 2:4 in row 3, at column 4"
    with pytest.raises(InputError, match=words):
        prune_model(
            model, token_rows(16), get_method("magnitude"), PATTERN, PruneParams(),
            comm=Comm.single(), memory=Memory(8), layers=LayerChoice(existing="keep"),
        )  # fmt: skip


def test_the_one_that_takes_more_damping_has_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two large inputs of its down projection are the same, so that its Hessian is singular."""
    results = []
    for alone in (stacks._ALONE, ()):
        monkeypatch.setattr(stacks, "_ALONE", alone)
        model = mixture()
        expert = find_blocks(model)[1][0].get_submodule("mlp.experts.2")
        with torch.no_grad():
            for linear in (expert.gate_proj, expert.up_proj):
                linear.weight[:2] = 3 * linear.weight[0]
        found = pruned("sparsegpt", model, damping=1e-7)
        results.append((model.state_dict(), {r.name: r.damping for r in found.layers}))
    (one, dampings), (other, others) = results
    assert dampings == others
    raised = {name for name, damping in dampings.items() if damping != 1e-7}
    assert raised == {"model.layers.0.mlp.experts.2.down_proj"}
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-5)


def quantized(model: Any, method: str = "gptq", **options: Any) -> QuantResult:
    """Of a pruned mixture, whose masks are its zeros."""
    masks = pruned("magnitude", model).keep_masks
    return quantize_model(
        model, token_rows(16), masks, QuantParams(method, **options), comm=Comm.single(),
        batch_size=8,
    )  # fmt: skip


def assert_same_codes(found: dict[str, Codes], expected: dict[str, Codes]) -> None:
    """A value in the middle between two levels goes to either, and its row follows."""
    assert found.keys() == expected.keys()
    rows = [
        (found[name].values_OI == codes.values_OI).all(1) for name, codes in expected.items()
    ]  # fmt: skip
    assert torch.cat(rows).float().mean() > 0.99


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_model_is_quantised_as_one_by_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = quantized(mixture(), method)
    shapes = note_shapes(monkeypatch, quantize)
    monkeypatch.setattr(stacks, "_ALONE", ())
    model = mixture()
    found = quantized(model, method)
    assert shapes == {2, 3}
    assert_same_codes(*({n: q.codes for n, q in r.layers.items()} for r in (found, expected)))
    state = model.state_dict()
    for name, layer in found.layers.items():
        assert torch.equal(state[f"{name}.weight"], layer.weight_OI), name
    reports = {report.name: report for report in found.reports}
    assert len(reports) == len(expected.reports)
    for report in expected.reports:
        mine = reports[report.name]
        assert mine.error == pytest.approx(report.error, rel=1e-2)
        assert (mine.shape, mine.num_tokens, mine.damping) == (
            report.shape, report.num_tokens, report.damping,
        )  # fmt: skip


def note_shapes(monkeypatch: pytest.MonkeyPatch, module: Any) -> set[int]:
    """Dimensions of the weights that a module quantises from now on."""
    shapes: set[int] = set()
    solve = module.quantize_rows

    def noted(weight_RI: Tensor, *others: Any) -> Quantized:
        shapes.add(weight_RI.ndim)
        found: Quantized = solve(weight_RI, *others)
        return found

    monkeypatch.setattr(module, "quantize_rows", noted)
    return shapes


def note_factored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers for which the quantiser factors a Hessian from now on."""
    seen: list[str] = []
    one, several = gptq.inverse_factor, gptq.inverse_factors

    def of_one(hessian_II: Tensor, damping: float, name: str, **others: Any) -> InverseFactor:
        seen.append(name)
        return one(hessian_II, damping, name, **others)

    def of_several(
        hessian_EII: Tensor, damping: float, names: Sequence[str], **others: Any
    ) -> list[InverseFactor]:
        seen.extend(names)
        return several(hessian_EII, damping, names, **others)

    monkeypatch.setattr(gptq, "inverse_factor", of_one)
    monkeypatch.setattr(gptq, "inverse_factors", of_several)
    return seen


def test_inputs_of_a_stack_are_known_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For gate and up projections, which share them."""
    seen = note_factored(monkeypatch)
    monkeypatch.setattr(stacks, "_ALONE", ())
    found = quantized(mixture())
    shared = ("up_proj", "k_proj", "v_proj")
    assert sorted(seen) == sorted(name for name in found.layers if not name.endswith(shared))


def test_parts_of_a_stack_know_their_inputs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stack in which pruning took other dampings, and which it solves in parts: the gate
    projections of all of them, then the up projections."""
    random_family("qwen3_moe").save_pretrained(tmp_path / "mixture")
    factor = moments.inverse_factors

    def raised(hessian_EII: Tensor, damping: float, names: Sequence[str]) -> list[InverseFactor]:
        found = factor(hessian_EII, damping, names)
        return [*found[:-2], *(replace(each, damping=2 * damping) for each in found[-2:])]

    monkeypatch.setattr(moments, "inverse_factors", raised)
    monkeypatch.setattr(stacks, "_ALONE", ())
    seen = note_factored(monkeypatch)
    found = prune_checkpoint(
        tmp_path / "mixture", tmp_path / "out", token_rows(16), get_method("sparsegpt"), PATTERN,
        FEW_STEPS, comm=Comm.single(), memory=Memory(8), one_pass=OnePass(QuantParams()),
    )  # fmt: skip
    names = [layer.name for layer in found.layers]
    assert len({layer.damping for layer in found.layers}) == 2
    shared = ("up_proj", "k_proj", "v_proj")
    assert sorted(seen) == sorted(name for name in names if not name.endswith(shared))


def refusal(solve: Callable[[list[Layer]], object], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a walk says whose stacks are solved by this."""
    monkeypatch.setattr(stacks, "_ALONE", ())
    with pytest.raises(SingularHessianError) as error:
        walk_blocks(
            BlocksInMemory(mixture()), token_rows(16), lambda _: None, comm=Comm.single(),
            memory=Memory(8), needs=SolverNeeds(), solve_stack=solve,
        )  # fmt: skip
    return str(error.value)


@pytest.mark.parametrize("option", ["quantize.damping", "prune.damping"])
def test_the_one_that_is_singular_is_named_with_its_tokens(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that no damping helps, as no mean of squares is, but of numbers that overflow."""
    counts: list[int] = []

    def solve(layers: list[Layer]) -> None:
        counts.extend(layer.moments.num_tokens for layer in layers)
        layers[2].moments.hessian_II[0, 1:] = layers[2].moments.hessian_II[1:, 0] = 1e6
        if option == "quantize.damping":
            KnownInputs(QuantParams(), has_teacher=False).of(layers)
        else:
            moments.factor_all([x.moments for x in layers], 0.01, [x.name for x in layers])

    said = refusal(solve, monkeypatch)
    assert counts[2] not in (counts[0], counts[1])
    assert said.startswith("model.layers.0.mlp.experts.2.gate_proj: the Hessian is singular: ")
    assert said.endswith(
        f"or a larger {option} ({counts[2]} calibration tokens were used)"
    )  # fmt: skip


def test_no_tokens_are_told_of_where_no_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def solve(layers: list[Layer]) -> None:
        raise SingularHessianError(f"{layers[0].name}s: singular")

    assert refusal(solve, monkeypatch) == "model.layers.0.mlp.experts.0.gate_projs: singular"


def test_looking_for_the_one_that_is_refused_quantises_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method refuses a stack, and then the last of its layers."""
    random_family("qwen3_moe").save_pretrained(tmp_path / "mixture")
    magnitude = get_method("magnitude")

    def solve(problem: Problem, pattern: Pattern, params: PruneParams) -> Solution:
        if problem.weight_OI.ndim == 3 or ".experts.3." in problem.name:
            raise InputError(f"{problem.name}: refused")
        return magnitude.solve(problem, pattern, params)

    monkeypatch.setattr(stacks, "_ALONE", ())
    seen = note_factored(monkeypatch)
    with pytest.raises(InputError, match=r"experts\.3\.gate_proj: refused"):
        prune_checkpoint(
            tmp_path / "mixture", tmp_path / "out", token_rows(16),
            replace(magnitude, solve=solve), PATTERN, FEW_STEPS, comm=Comm.single(),
            memory=Memory(8), one_pass=OnePass(QuantParams()),
        )  # fmt: skip
    assert seen and not any(".experts." in name for name in seen)


@pytest.mark.parametrize("method", ["sparsegpt", "twofour"])
def test_one_walk_quantises_stacks(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert is skipped: it is in a stack without the others."""
    mixture_path = tmp_path / "mixture"
    random_family("qwen3_moe").save_pretrained(mixture_path)
    shapes: set[int] = set()
    results = []
    for at, alone in enumerate((stacks._ALONE, ())):
        monkeypatch.setattr(stacks, "_ALONE", alone)
        shapes = note_shapes(monkeypatch, one_pass)
        out = tmp_path / str(at)
        found = prune_checkpoint(
            mixture_path, out, token_rows(16), get_method(method), PATTERN, FEW_STEPS,
            comm=Comm.single(), memory=Memory(8),
            one_pass=OnePass(QuantParams(), skip=["*.experts.1.*"]),
        )  # fmt: skip
        tensors = {}
        for path in sorted(out.glob("codes/*.safetensors")):
            tensors |= load_file(path)
        results.append((found.layers, tensors))
    assert shapes == {2, 3}
    (expected, codes), (layers, mine) = results
    assert mine.keys() == codes.keys() and not any(".experts.1." in name for name in mine)
    equal = [(mine[name] == part).float().mean() for name, part in codes.items()]
    assert torch.stack(equal).mean() > 0.99
    costs = {layer.name: layer.rounding_error for layer in layers}
    for layer in expected:
        if ".experts.1." in layer.name:
            assert layer.rounding_error is costs[layer.name] is None
        else:
            assert costs[layer.name] == pytest.approx(layer.rounding_error, rel=2e-2)


def test_a_checkpoints_fragments_are_written_of_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_ALONE", ())
    model = mixture()
    masks = pruned("magnitude", model).keep_masks
    model.save_pretrained(tmp_path / "pruned")
    expected = quantize_model(
        model, token_rows(16), masks, QuantParams(), comm=Comm.single(), batch_size=8
    )
    reports = quantize_checkpoint(
        tmp_path / "pruned", tmp_path / "out", token_rows(16), masks, PATTERN, QuantParams(),
        comm=Comm.single(), memory=Memory(8),
    )  # fmt: skip
    assert reports == expected.reports
    tensors = {}
    for path in (tmp_path / "out").glob("fragment-*.safetensors"):
        tensors |= load_file(path)
    for name, layer in expected.layers.items():
        assert torch.equal(tensors[f"{name}.weight_scales"], layer.codes.scales_OG)


def test_the_one_of_a_stack_that_cannot_be_quantised_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stacks, "_ALONE", ())
    model = mixture()
    masks = pruned("magnitude", model).keep_masks
    name = "model.layers.0.mlp.experts.2.down_proj"
    with torch.no_grad():
        model.get_submodule(name).weight *= 1e30
        model.get_submodule("model.layers.0.mlp.experts.2.up_proj").weight *= 1e-30
    with pytest.raises(InputError, match=f"^{name}: weights up to .* need scales beyond"):
        quantize_model(
            model, token_rows(16), masks, QuantParams("rtn"), comm=Comm.single(), batch_size=8
        )


def test_the_one_that_takes_more_damping_has_it_in_the_stack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As above; the others keep what was asked for."""
    dampings = []
    for alone in (stacks._ALONE, ()):
        monkeypatch.setattr(stacks, "_ALONE", alone)
        model = mixture()
        masks = pruned("magnitude", model).keep_masks
        expert = find_blocks(model)[1][0].get_submodule("mlp.experts.2")
        with torch.no_grad():
            for linear in (expert.gate_proj, expert.up_proj):
                linear.weight[:2] = 3 * linear.weight[0]
        found = quantize_model(
            model, token_rows(16), masks, QuantParams(damping=1e-7), comm=Comm.single(),
            batch_size=8,
        )  # fmt: skip
        dampings.append({report.name: report.damping for report in found.reports})
    assert dampings[0] == dampings[1]
    raised = {name for name, damping in dampings[0].items() if damping != 1e-7}
    assert raised == {"model.layers.0.mlp.experts.2.down_proj"}
