"""Pruning counted on a stand-in for a GPU: products, launches and waits, as the shapes say."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from jobs.benchmarks import roofline
from jobs.benchmarks.model import limits
from jobs.benchmarks.support.kernel_costs import KERNELS
from jobs.benchmarks.support.mixtures import MIXTURES, mixture_config
from jobs.benchmarks.support.op_costs import Cost
from jobs.benchmarks.support.random_llama import llama_config, random_rows
from jobs.benchmarks.support.stand_in_gpu import (
    DEVICE,
    Spent,
    StandInGpu,
    empty_model,
    stand_in_gpu,
    without_data,
)
from sparsify import comm
from sparsify.calibration import cholesky
from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.layers import Layer, prunable_linears
from sparsify.comm import Comm
from sparsify.costs.cards import find_card
from sparsify.costs.seconds import Rates
from sparsify.errors import InputError, TwofourError
from sparsify.models import experts
from sparsify.params import QuantParams
from sparsify.quantization import quantize, quantize_model

RATES = Rates(products=1e12, attention=1e12, bandwidth=1e12, link=1e12, network=1e12,
              float32=1e11, launch_s=1e-6)  # fmt: skip


@cache
def counted(method: str, samples: int, batch_size: int) -> dict[str, Any]:
    options = Namespace(
        blocks=2, samples=samples, length=128, batch_size=batch_size, method=method, order="auto",
        seed=0,
    )  # fmt: skip
    config = llama_config("bench-512", 2, 128, 4096)
    return roofline.count(config, options, RATES, Memory(batch_size))


def all_of(found: dict[str, Any]) -> Spent:
    return sum(found["blocks"], Spent())


def test_a_product_a_view_and_a_wait() -> None:
    with stand_in_gpu(RATES) as gpu:
        x_TI = torch.empty(10, 256, device=DEVICE, dtype=torch.bfloat16)
        weight_OI = torch.empty(64, 256, device=DEVICE, dtype=torch.bfloat16)
        before = gpu.now()
        y_TO = nn.functional.linear(x_TI[:8].view(8, 256), weight_OI)
        product = gpu.now() - before
        assert float(y_TO.float().sum().item()) == 1.0
        assert bool(y_TO.isfinite().all()) and not bool(y_TO.isnan().any())
        after = gpu.now() - before
    assert product["operations:half"] == 2 * 8 * 256 * 64
    assert product["bytes"] == 2 * (8 * 256 + 64 * 256 + 8 * 64)
    assert product["launches"] == 1 and product.get("waits", 0) == 0
    assert after["waits"] == 3


def test_a_copy_of_a_module_is_a_module_of_its_own_and_counted() -> None:
    """torch's own copy of a tensor without data reads memory that is not there."""
    with stand_in_gpu(RATES) as gpu:
        linear = nn.Linear(64, 32, device="meta")
        without_data(linear)
        before = gpu.now()
        twin = deepcopy(linear)
        spent = gpu.now() - before
        assert isinstance(twin.weight, nn.Parameter) and twin.weight is not linear.weight
        assert twin.weight.is_cuda and twin.weight.shape == (32, 64)
    assert spent["launches"] == 2 and spent["bytes"] == 2 * 4 * (32 * 64 + 32)


def test_the_longer_of_arithmetic_and_bytes_and_the_host_before_both() -> None:
    assert Cost("half", 2e12, 1e12).seconds(RATES) == (2.0, "half")
    assert Cost("half", 1e12, 2e12).seconds(RATES) == (2.0, "memory")
    gpu = StandInGpu(RATES)
    gpu.launch("long", Cost("half", 5e6))
    gpu.launch("behind it", Cost("half", 5e6))
    assert gpu.now()["s"] == pytest.approx(11e-6), "the second launch hides behind the first"
    gpu.launch("after a wait", Cost("half", 5e6))
    spent = gpu.now()
    assert spent["s"] == pytest.approx(17e-6)
    assert spent["s:launches"] == pytest.approx(2e-6)
    assert spent["s:half"] == pytest.approx(15e-6)


@pytest.mark.parametrize(("method", "batch_size"), [("sparsegpt", 8), ("twofour", 2)])
def test_phases_make_up_the_blocks(method: str, batch_size: int) -> None:
    """Held forwards of twofour, which are on threads of their own, are counted with the rest."""
    found = counted(method, 16 if method == "sparsegpt" else 4, batch_size)
    of_phases = sum((one for block in found["phases"] for one in block.values()), Spent())
    assert 0.9 * all_of(found)["s"] <= of_phases["s"] <= all_of(found)["s"] * 1.000001
    for key, value in all_of(found).items():
        assert of_phases.get(key, 0.0) <= value * 1.000001, key


def test_counted_operations_are_those_of_the_formulas() -> None:
    """SparseGPT in the order of blocks: two forwards, a Gram matrix and a factor an input."""
    found = counted("sparsegpt", 16, 8)
    config = llama_config("bench-512", 2, 128, 4096)
    formulas = limits(config, 16, 128, {"model": 1.0, "float32": 1.0})
    first = found["phases"][0]

    def products(phase: str) -> float:
        return first[phase]["operations:half"] + first[phase]["operations:attention"]

    assert products("forward") == pytest.approx(formulas["forward"])
    last_layer = 2 * 16 * 128 * 512 * 1408  # before which the first pass ends
    looked_at = products("statistics") - (formulas["statistics"] - last_layer)
    one_row = formulas["forward"] / 16
    assert 0 < looked_at <= 3 * one_row, "what calls what is seen on one row"
    assert found["kernels"]["_gram_kernel"][0] == 4 * 2 * 2, "inputs, batches, blocks"
    num_panels = sum(columns // 128 for columns in (512,) * 6 + (1408,))
    assert found["kernels"]["_sweep_block_kernel"][0] == 2 * num_panels


def test_a_card_holds_what_fits_beside_the_states() -> None:
    config = llama_config("llama-3.1-8b", 2, 2048, 4096)
    options = Namespace(samples=512, length=2048, batch_size=8, method="twofour")
    card = find_card("h100", "")
    spare = roofline.memory_of(config, options, card).spare_bytes
    assert spare == pytest.approx(0.4 * card.memory_bytes - 2 * 2 * 512 * 2048 * 4096)
    options.samples = 2048
    with pytest.raises(InputError, match="--samples 2048: hidden states of 69 GB have no room"):
        roofline.memory_of(config, options, card)


def test_an_unknown_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KERNELS, "_gram_kernel")
    with pytest.raises(TwofourError, match="kernel _gram_kernel is not known; add what it"):
        counted("sparsegpt", 2, 2)
    assert torch.ones(2).sum().item() == 2, "and numbers are numbers again"


def test_what_is_done_in_a_phase_is_spent_there() -> None:
    gpu = StandInGpu(RATES)
    with gpu.phase("outer"):
        gpu.launch("first", Cost("half", 4e6))
        with gpu.phase("inner"):
            gpu.launch("second", Cost(num_bytes=6e6))
        gpu.wait()
    with gpu.paused():
        gpu.launch("third", Cost("half", 1e9))
    assert gpu.now()["s"] == pytest.approx(11e-6)
    outer, inner = Spent(gpu.phases["outer"]), Spent(gpu.phases["inner"])
    assert outer["s"] == pytest.approx(5e-6) and outer["waits"] == 1
    assert inner["s"] == pytest.approx(6e-6) and inner.bound == "memory 100%"


def test_what_crosses_links_hides_behind_work_until_it_is_asked_for() -> None:
    gpu = StandInGpu(RATES)
    finish = gpu.exchange("all_gather", 3e6)  # 3 us, after 1 us of the host
    gpu.launch("beside it", Cost("half", 1e6))
    finish()
    spent = gpu.now()
    assert spent["s"] == pytest.approx(4e-6)
    assert spent["s:links"] == pytest.approx(1e-6), "the rest was hidden"
    assert spent["exchanged bytes"] == 3e6


def test_several_gpus_share_rows_and_solving_and_sum_their_moments() -> None:
    """SparseGPT on two: half of the products, every Hessian summed once around the ring."""
    options = Namespace(blocks=2, samples=16, length=128, batch_size=4, method="sparsegpt",
                        order="auto", seed=0)  # fmt: skip
    config = llama_config("bench-512", 2, 128, 4096)
    one, two = (roofline.count(config, options, RATES, Memory(4), gpus) for gpus in (1, 2))
    first = [found["phases"][0] for found in (one, two)]
    ratio = first[0]["forward"]["operations:half"] / first[1]["forward"]["operations:half"]
    assert ratio == pytest.approx(2)
    panels = [found["kernels"]["_sweep_block_kernel"][0] for found in (one, two)]
    assert panels[0] == panels[1], "each solves some rows of every layer"
    hessians = 4 * (3 * 512**2 + 1408**2)  # float32, one an input
    exchanged = two["phases"][0]["reduce"]["exchanged bytes"]
    assert hessians <= exchanged <= 1.1 * hessians
    assert all_of(one).get("exchanged bytes", 0.0) == 0


def test_several_gpus_share_the_widest_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of four has a quarter of it, the triangles of its panels, and one of the others."""
    monkeypatch.setattr(comm, "_LEAST_SHARED", 1024)
    monkeypatch.setattr(cholesky, "_PANEL", 64)
    options = Namespace(blocks=1, samples=8, length=32, batch_size=2, method="sparsegpt",
                        order="auto", seed=0)  # fmt: skip
    config = llama_config("bench-512", 1, 32, 4096)
    spent = roofline.count(config, options, RATES, Memory(2), 4)["phases"][0]["factor"]
    wide, narrow, panel, leaf = 1408, 512, 64, 256
    shares = 2 / 3 * (wide**3 / 4 + narrow**3)
    # The triangles less what the first has of their rows; leaves are solved as if they were full.
    beside = panel * wide**2 * 3 / 4 + 2 * 2 / 3 * leaf**3
    beside += 5 * 6 * (wide**2 + narrow**2)  # of the condition, five steps at both ends
    counted = spent["operations:factor"] + spent["operations:float32"]
    assert counted == pytest.approx(shares + beside, rel=0.02)
    # float32: whole factors; half of the wide matrix, of which it has a quarter; and half again.
    sent = 4 * (3 * narrow**2 + wide**2 / 2 * (3 / 4 + 1))
    assert sent <= spent["exchanged bytes"] <= 1.1 * sent


def mixture(method: str, num_experts: int) -> dict[str, Any]:
    options = Namespace(blocks=1, samples=4 * num_experts, length=64, batch_size=4 * num_experts,
                        method=method, order="auto", seed=0)  # fmt: skip
    return roofline.count(small_mixture(num_experts), options, RATES, Memory(options.batch_size))


def small_mixture(num_experts: int) -> Any:
    sizes = {
        **MIXTURES["qwen3-30b-a3b"], "hidden_size": 512, "moe_intermediate_size": 384,
        "num_experts": num_experts, "num_experts_per_tok": 4, "num_attention_heads": 4,
    }  # fmt: skip
    return mixture_config(sizes, 1, 64, 4096)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_experts_are_factored_and_solved_together(method: str) -> None:
    """Launches and waits for a block do not grow with its experts, and their work does."""
    few, many = (mixture(method, num_experts) for num_experts in (4, 16))
    for phase in ("factor", "solve") if method == "sparsegpt" else ("solve",):
        spent = [found["phases"][0][phase] for found in (few, many)]
        for key in ("launches", "waits"):
            assert spent[0][key] == pytest.approx(spent[1][key]), (phase, key)
        assert spent[1]["bytes"] > 2 * spent[0]["bytes"], phase
    if method == "sparsegpt":
        sweeps = [found["kernels"]["_sweep_block_kernel"][0] for found in (few, many)]
        # Blocks of 128 columns: of q, k, v and o, and once for all experts' gate, up and down.
        assert sweeps[0] == sweeps[1] == 4 + 4 + 4 + 4 + 4 + 4 + 3


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_experts_are_quantised_together(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of a block grow by one for each layer, which is its copy into the module, and waits
    not at all; kernels are as many."""
    names = {"_search_kernel", "_eliminate_kernel", "_descend_kernel"}
    for name in names:
        monkeypatch.setitem(KERNELS, name, lambda named: Cost())
    solve, spent = quantize._Run._solve, Spent()

    def counted(run: Any, layers: list[Layer]) -> None:
        nonlocal spent
        before = gpu.now()
        solve(run, layers)
        if len(layers) > 1:
            spent += gpu.now() - before

    monkeypatch.setattr(quantize._Run, "_solve", counted)
    found, kernels = [], []
    for num_experts in (4, 16):
        model, spent = empty_model(small_mixture(num_experts)), Spent()
        with stand_in_gpu(RATES) as gpu:
            without_data(model)
            rows = random_rows(4 * num_experts, 64, 4096, 0)
            masks = {name: torch.ones(layer.weight.shape, dtype=torch.bool)
                     for _, name, layer in prunable_linears(model)}  # fmt: skip
            quantize_model(
                model, rows, masks, QuantParams(method), comm=Comm.single(),
                batch_size=4 * num_experts,
            )  # fmt: skip
        kernels.append({name: gpu.kernels[name][0] for name in names & gpu.kernels.keys()})
        found.append(spent)
    assert kernels[0] == kernels[1] and len(kernels[0]) == (3 if method == "gptq" else 1)
    assert found[0]["waits"] == found[1]["waits"] > 0
    assert found[1]["launches"] - found[0]["launches"] == 3 * (16 - 4)


def test_experts_of_large_shapes_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the bytes makes four stacks, each with its launches."""
    whole = mixture("sparsegpt", 8)["kernels"]["_sweep_block_kernel"][0]
    monkeypatch.setattr(experts, "STACK_BYTES", 2 * 4 * 512 * 512)
    cut = mixture("sparsegpt", 8)["kernels"]["_sweep_block_kernel"][0]
    attention, of_experts = 4 * 4, 4 + 4 + 3
    assert whole == attention + of_experts and cut == attention + 4 * of_experts


def test_a_mixture_is_not_measured() -> None:
    parser = ArgumentParser()
    roofline.add_arguments(parser)
    words = ["--shape", "qwen3-30b-a3b", "--blocks", "1", "--device", "cuda"]
    with pytest.raises(InputError, match="qwen3-30b-a3b is counted alone"):
        roofline._config(parser.parse_args(words))
    assert roofline._config(parser.parse_args(words[:4]))[0] == 48


def test_files_are_read_and_written_beside_the_blocks() -> None:
    assert roofline.whole_model_seconds(32, 2.0, 0.5) == 64.5
    assert roofline.whole_model_seconds(32, 0.5, 2.0) == 66.0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"gpus": 0}, "--gpus 0: at least 1"), ({"disk_gb_s": 0.0}, "--disk-gb-s 0: give a rate")],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], words: str) -> None:
    parser = ArgumentParser()
    roofline.add_arguments(parser)
    options = vars(parser.parse_args(["--shape", "bench-512", "--blocks", "2"]))
    with pytest.raises(InputError, match=words):
        roofline.run(Namespace(**options | wrong))
