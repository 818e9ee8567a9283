"""What a plan counts, against models that were made, steps that were taken and files on record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from jobs.benchmarks.support.families import family_config
from sparsify.costs.cards import cards, find_card
from sparsify.costs.deploy import AdapterTraining, adapter_memory, deployed_sizes, kv_cache_bytes
from sparsify.costs.flops import peak_flops
from sparsify.costs.layout import Pruning, Training
from sparsify.costs.memory import _head, pruning_memory, training_memory
from sparsify.costs.seconds import (
    Rates,
    pruning_seconds,
    quantizing_seconds,
    rates_of,
    step_seconds,
    traffic,
)
from sparsify.costs.shapes import ModelShape, kept_bytes, read_shape
from sparsify.costs.trace import LayerGroup
from sparsify.errors import InputError
from sparsify.models.experts import STACK_BYTES
from sparsify.models.structure import find_blocks, linears_of
from sparsify.models.unfuse import unfuse_experts
from sparsify.packed.layer import packed_num_bytes
from sparsify.params import QuantParams
from sparsify.pattern import Pattern

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    num_hidden_layers=32, vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_2_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
    num_hidden_layers=80, vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 320,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    return read_shape(LLAMA_8B)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL), LlamaConfig(**SMALL, tie_word_embeddings=True),
        Qwen3Config(**SMALL, head_dim=16), MixtralConfig(**SMALL, num_local_experts=4),
        family_config("gpt_oss"), family_config("granitemoe"), family_config("dbrx"),
        family_config("llama4_text"),
    ],
)  # fmt: skip
def test_counts_are_those_of_the_model_itself(config: Any) -> None:
    shape = read_shape(config)
    model: Any = AutoModelForCausalLM.from_config(config)
    unfuse_experts(model)
    _, blocks = find_blocks(model)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.blocks_parameters == sum(p.numel() for p in blocks.parameters())
    assert shape.linear_parameters == sum(
        layer.weight.numel() for block in blocks for layer in linears_of(block).values()
    )
    assert shape.is_tied is config.tie_word_embeddings
    assert shape.outside_parameters + shape.blocks_parameters == shape.num_parameters


def test_published_models_have_their_published_sizes(llama: ModelShape) -> None:
    assert llama.num_parameters == 8_030_261_248
    assert llama.linear_parameters == 6_979_321_856
    assert [group.layers for group in llama.groups] == [
        ((4096, 4096), (1024, 4096), (1024, 4096)), ((4096, 4096),),
        ((14336, 4096), (14336, 4096)), ((4096, 14336),),
    ]  # fmt: skip
    assert not llama.has_experts and len(llama.layers) == 7
    large = read_shape(LLAMA_2_70B)
    assert large.num_parameters == 68_976_648_192
    assert kv_cache_bytes(large, 4096) == pytest.approx(1.34e9, rel=0.01)


def launched(shape: ModelShape, setup: Pruning, rates: Rates) -> float:
    """Launches that quantising is planned with, of a second each."""
    timed = (quantizing_seconds(shape, setup, replace(rates, launch_s=s)) for s in (1.0, 0.0))
    one, none = (found["solve"] for found in timed)
    return one - none


def test_quantising_sweeps_and_follows_its_teacher(llama: ModelShape) -> None:
    """Two operations for each O I^2: of the residual, of each sweep, and twice of the target."""
    rates = rates_of(find_card("h100", "card"), 2)
    squares = llama.num_blocks * sum(rows * columns**2 for rows, columns in llama.layers)

    def solved(num_sweeps: int, **layout: Any) -> float:
        setup = replace(Pruning("gptq", world_size=2), **layout)
        params = QuantParams(num_refine_sweeps=num_sweeps)
        found = quantizing_seconds(llama, setup, rates, params)["solve"]
        walk = pruning_seconds(llama, replace(setup, method="sparsegpt"), rates)["solve"]
        return (found - walk - launched(llama, setup, replace(rates, launch_s=0.0)) * rates.launch_s
                ) * rates.float32 * 2 / squares  # fmt: skip

    assert solved(0, needs_teacher=False) == pytest.approx(2)
    assert solved(8, needs_teacher=False) == pytest.approx(18)
    assert solved(8, needs_teacher=True) == pytest.approx(22)
    assert solved(8, needs_teacher=True, method="rtn") == pytest.approx(0)


def test_experts_are_counted_by_the_tokens_that_they_meet() -> None:
    """Four experts of which a token meets two, and one of twice the width that all tokens meet; the
    first block has none."""
    config = Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=80,
        shared_expert_intermediate_size=160, mlp_only_layers=[0],
    )  # fmt: skip
    shape = read_shape(config)
    assert shape.groups == (
        LayerGroup(((64, 64), (32, 64), (32, 64))), LayerGroup(((64, 64),)),
        LayerGroup(((160, 64), (160, 64), (1, 64))), LayerGroup(((64, 160),)),
        LayerGroup(((80, 64), (80, 64)), 4, 0.5), LayerGroup(((64, 80),), 4, 0.5),
    )  # fmt: skip
    assert len(shape.layers) == 4 + 4 + 4 * 3 and shape.has_experts
    setup = Pruning(num_samples=64, sequence_length=128, method="sparsegpt", needs_teacher=False)
    rates = replace(rates_of(cards()["h100"], 2), products=1.0, float32=1.0)
    found = pruning_seconds(shape, setup, rates)
    squares = 3 * 64**2 + 160**2 + 4 * 0.5 * (64**2 + 80**2)
    assert found["statistics"] == pytest.approx(3 * 64 * 128 * squares)
    cubes = 3 * 64**3 + 160**3 + 4 * (64**3 + 80**3)
    assert found["factor"] == pytest.approx(3 * 4 / 3 * cubes)
    parts = pruning_memory(shape, setup).parts
    assert parts["solver"] == 4 * 5 * (4 * 80 * 64)  # of all experts' gates, as a stack
    large = replace(shape, groups=(LayerGroup(((8192, 8192),), 128, 0.1),))
    assert pruning_memory(large, setup).parts["solver"] == 5 * STACK_BYTES
    assert launched(shape, setup, rates) == pytest.approx(
        3 * 85 / 128 * (4 * 64 + 2 * 64 + 160 + 64 + 2 * 64 + 80)  # experts' as those of one
    )
    assert launched(large, setup, rates) == pytest.approx(3 * 85 / 128 * 128 * 8192)  # one by one
    held = parts["Hessians"]  # of all experts at once
    assert held == (4 + 4) * (3 * 64**2 + 160**2 + 4 * (64**2 + 80**2)) + 6 * 160**2


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_experts_that_files_hold_as_one_tensor_are_counted_one_by_one(family: str) -> None:
    shape = read_shape(family_config(family, num_experts_per_tok=2))
    attention = sum(rows * columns for rows, columns in ((32, 32), (16, 32), (16, 32), (32, 32)))
    assert shape.linear_parameters == 3 * (attention + 4 * 3 * 48 * 32)
    assert shape.groups[-2:] == (
        LayerGroup(((48, 32), (48, 32)), 4, 0.5), LayerGroup(((32, 48),), 4, 0.5),
    )  # fmt: skip


MIXTURES = [
    MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2),
    Qwen3MoeConfig(**SMALL, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=48),
    OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2),
    Qwen2MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=80),
    *(family_config(name) for name in ("dbrx", "gpt_oss", "llama4_text")),
]  # fmt: skip


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SMALL), Qwen3Config(**SMALL, head_dim=16), *MIXTURES],
    ids=lambda config: config.model_type,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_a_real_step_keeps(
    config: Any, dtype: torch.dtype, monkeypatch
) -> None:
    """Of a mixture with its experts apart, as a recovery has them."""
    model: Any = AutoModelForCausalLM.from_config(config).to(dtype)
    unfuse_experts(model)
    monkeypatch.setattr(model.config, "_attn_implementation", "counted")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    held = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        held.append(storage)
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        ids_BT = torch.randint(1, config.vocab_size, (2, 256))  # 0 pads, and is all zeros
        model.base_model(input_ids=ids_BT, use_cache=False)
    real = sum(found.values()) / 512
    # The real step also keeps what comes before and after the blocks: the last norm's input.
    assert read_shape(config).kept[dtype.itemsize] == pytest.approx(real, rel=0.06)


def test_recomputed_blocks_keep_their_inputs(llama: ModelShape) -> None:
    everything, _ = kept_bytes(llama, 2, 0.0, False)
    nothing, again = kept_bytes(llama, 2, 1.0, False)
    assert nothing == 32 * 4096 * 2
    assert again == pytest.approx(everything / 32)
    assert everything / 32 / 8192 == pytest.approx(24.9, rel=0.03)  # counted in a real block


def test_a_family_that_cannot_be_followed_is_named_with_the_reason() -> None:
    shape = read_shape(family_config("jetmoe"))  # asks where each token goes
    assert not shape.kept and shape.num_parameters > 0
    setup, rates = Training(sequence_length=128), rates_of(cards()["h100"], 2)
    for count in (
        lambda: training_memory(shape, shape, setup), lambda: kept_bytes(shape, 2, 0.0, False),
        lambda: step_seconds(shape, shape, setup, rates),
        lambda: adapter_memory(shape, AdapterTraining()),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"^JetMoeForCausalLM: .* \(\w+: .*meta.*\)"):
            count()


def test_states_of_a_mixture_are_those_of_all_its_experts() -> None:
    few, many = (
        read_shape(Qwen3MoeConfig(
            **SMALL, num_experts=num, num_experts_per_tok=2, moe_intermediate_size=48
        ))
        for num in (8, 16)
    )  # fmt: skip
    setup, rates = Training(sequence_length=128), rates_of(cards()["h100"], 2)
    experts = 3 * 8 * (3 * 48 * 64)
    routers = 3 * 8 * 64
    assert many.num_parameters - few.num_parameters == experts + routers
    held = [training_memory(shape, shape, setup).parts for shape in (few, many)]
    for part, size in (("student", 2), ("teacher", 2), ("masters", 4), ("moments", 8)):
        assert held[1][part] - held[0][part] == size * (experts + routers)
    # The router alone has more to multiply, and to keep.
    assert many.flops.num_block_weights - few.flops.num_block_weights == routers
    assert few.kept[2] < many.kept[2] < few.kept[2] + 3 * 8 * 16
    spent = [step_seconds(shape, shape, setup, rates) for shape in (few, many)]
    assert spent[0]["products"] < spent[1]["products"] < 1.05 * spent[0]["products"]
    grown = many.num_parameters / few.num_parameters
    assert spent[1]["engine"] == pytest.approx(grown * spent[0]["engine"])


def test_starting_the_kernels_of_many_small_experts_takes_time(llama: ModelShape) -> None:
    rates = rates_of(cards()["h100"], 2)
    setup = Training(sequence_length=8192)
    assert step_seconds(llama, llama, setup, rates)["launches"] == 0
    config = Qwen3MoeConfig(
        **SMALL, num_experts=64, num_experts_per_tok=4, moe_intermediate_size=48
    )  # fmt: skip
    shape = read_shape(config)
    # Of an expert: its inputs, three products, the activation, and gate times up.
    assert 3 * 64 * 6 < shape.num_kernels < 3 * (64 * 6 + 100)
    spent = step_seconds(shape, shape, setup, rates)
    whole = sum(value for part, value in spent.items() if part not in ("update", "gradient masks"))
    assert whole == pytest.approx(4 * shape.num_kernels * rates.launch_s, rel=0.01)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_are_divided_as_zero_divides_them(llama: ModelShape, stage: int) -> None:
    setup = Training(world_size=8, gpus_per_node=8, zero_stage=stage, sequence_length=128)
    parts = training_memory(llama, None, setup).parts
    count = llama.num_parameters
    assert parts["masters"] == 4 * count / 8
    assert parts["moments"] == 8 * count / 8
    assert parts["student"] == 2 * count / (8 if stage == 3 else 1)
    assert parts["teacher"] == 0
    offloaded = training_memory(llama, None, replace(setup, offload_optimizer=True))
    assert offloaded.parts["masters"] + offloaded.parts["moments"] == 0
    assert offloaded.host == 12 * count / 8


def test_less_is_held_with_more_workers_recomputing_and_splitting(llama: ModelShape) -> None:
    setup = Training(world_size=8, gpus_per_node=8, sequence_length=2048, micro_batch_size=4)
    whole = training_memory(llama, llama, setup).total
    for change in (
        {"world_size": 32}, {"recompute_share": 0.5}, {"teacher_placement": "node"},
        {"micro_batch_size": 1}, {"compile": True}, {"zero_stage": 3}, {"teacher_bytes": 1},
    ):  # fmt: skip
        changed: Training = replace(setup, **change)  # type: ignore[arg-type]
        assert training_memory(llama, llama, changed).total < whole, change


def test_packed_sizes_are_those_of_the_packed_file() -> None:
    config = LlamaConfig(**{**SMALL, "hidden_size": 128, "intermediate_size": 256})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    name, blocks = find_blocks(model)
    layers = [f"{name}.{i}.{n}" for i, block in enumerate(blocks) for n in linears_of(block)]
    expected = packed_num_bytes(model.state_dict(), layers, Pattern.parse("2:4"))
    sizes = {(d.format, d.is_packed): d.weight_bytes for d in deployed_sizes(read_shape(config))}
    assert sizes["bf16", True] == expected


def test_sizes_of_the_published_sparse_llama(llama: ModelShape) -> None:
    sizes = {(d.format, d.is_packed): d.weight_bytes / 1e9 for d in deployed_sizes(llama)}
    assert sizes["bf16", False] == pytest.approx(16.07, rel=0.002)  # its four files
    assert sizes["fp8", False] == pytest.approx(9.08, rel=0.005)
    assert sizes["bf16", True] == pytest.approx(9.95, rel=0.002)
    assert sizes["int4", True] == pytest.approx(4.83, rel=0.005)  # its W4A16 file


def test_llama_2_70b_on_single_cards() -> None:
    shape = read_shape(LLAMA_2_70B)
    sizes = {(d.format, d.is_packed): d.weight_bytes for d in deployed_sizes(shape)}
    assert sizes["int8", False] == pytest.approx(69.0e9, rel=0.01)
    usable = {name: 0.95 * card.memory_bytes for name, card in cards().items()}
    assert sizes["int4", False] + 1e9 < usable["a100-40"]
    assert usable["a100-40"] < sizes["int8", False] + 1e9 < 2 * usable["a100-40"]
    trained = sum(adapter_memory(shape, AdapterTraining(rank=4)).values())
    assert trained == pytest.approx(39.56e9, rel=0.05)  # on one A100 of 40 GB
    assert trained < usable["l40s"]


def test_a_step_is_its_operations_on_rates_that_leave_nothing_else(llama: ModelShape) -> None:
    rates = replace(rates_of(cards()["h100"], 2), bandwidth=1e30, attention=1e12, products=1e12)
    setup = Training(sequence_length=8192, num_micro_batches=2)
    seconds = sum(step_seconds(llama, llama, setup, rates).values())
    forward = llama.flops.forward([8192])
    linear = 2 * 8192 * (llama.flops.num_block_weights + llama.flops.num_head_weights)
    # Attention's backward is five products for two of forward, where twice would be four.
    expected = 2 * (4 * linear + 4.5 * (forward - linear)) / 1e12
    assert seconds == pytest.approx(expected, rel=1e-9)


def test_traffic_is_the_rings(llama: ModelShape) -> None:
    whole = 2 * llama.num_parameters * 7 / 8
    setup = Training(world_size=8, gpus_per_node=8, num_micro_batches=4)
    assert traffic(llama, None, replace(setup, zero_stage=1)) == 3 * whole
    assert traffic(llama, None, setup) == 9 * whole
    assert traffic(llama, None, replace(setup, zero_stage=3)) == 12 * whole
    assert traffic(llama, None, replace(setup, world_size=1)) == 0


def test_pruning_is_shared_by_workers(llama: ModelShape) -> None:
    one, eight = (Pruning(num_samples=512, world_size=count) for count in (1, 8))
    rates = rates_of(cards()["h100"], 2)
    times = [pruning_seconds(llama, setup, rates) for setup in (one, eight)]
    for part in ("forward", "statistics", "solve"):
        assert times[1][part] == pytest.approx(times[0][part] / 8)
    widths = [4096, 4096, 4096, 14336]  # one of which all factor together, the others one each
    together, alone = 14336**3 / 8, 4096**3
    share = (together + alone) / sum(width**3 for width in widths)
    assert times[1]["factor"] == pytest.approx(share * times[0]["factor"])
    assert pruning_memory(llama, eight).total < pruning_memory(llama, one).total


def test_cards_say_what_they_are_and_where_that_is_from() -> None:
    assert set(cards()) == {
        "a100-40", "a100-80", "h100", "h200", "b200", "l40s", "rtx4090", "rtx5090",
    }  # fmt: skip
    for card in cards().values():
        assert card.source.startswith("https://")
        assert card.flops["bf16"] > card.flops["fp32"] > 1e12
        assert 1e11 < card.bandwidth < 1e13
        found = peak_flops(f"NVIDIA {' '.join(card.words)}")
        assert found in (card.flops["bf16"], None)  # None: desks' cards, which it does not know
    with pytest.raises(InputError, match="did you mean h100"):
        find_card("h10", "cluster.card")


def test_logits_take_what_the_loss_makes_of_them(llama: ModelShape) -> None:
    # On a CPU the student's and the teacher's; on a GPU three more to work in (head_terms.py).
    one = 4 * 1024 * llama.vocab_size
    gpu = Training(sequence_length=2048, element_bytes=4, zero_stage=0)
    cpu = replace(gpu, uses_gpu=False)
    for setup, alone, taught in ((gpu, 2, 5), (cpu, 1, 2)):
        rest = 3 * 2048 * llama.hidden_size * 4 + 4 * llama.head_parameters
        assert _head(llama, None, setup) == pytest.approx(rest + alone * one)
        assert _head(llama, llama, setup) == pytest.approx(rest + taught * one)
    assert training_memory(llama, llama, cpu).parts["runtime"] < 0.2e9
