"""Documents of one row do not see each other, family by family; and experts that stay dense."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.layers import SolverNeeds
from sparsify.calibration.walk import walk_blocks
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.evaluation.perplexity import evaluate_rows
from sparsify.models.blocks import BlocksInMemory
from sparsify.models.isolation import check_isolation
from sparsify.models.structure import fused_experts

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WINDOW = {"sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ISOLATING = {
    "llama": {}, "mistral": WINDOW, "qwen2": {}, "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, **WINDOW}, "phi": {"num_key_value_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
}  # fmt: skip
LEAKING = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "mpt": {"d_model": 32, "n_heads": 4}}
ONLY_EAGER = ("gemma2", "mpt")  # transformers has no sdpa for them


def tiny(family: str, changes: dict, attention: str = "eager"):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**{**BASE, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    for parameter in model.parameters():  # zero biases and unit gains would hide mistakes
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model, rows: TokenRows):
    return model(
        input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False
    ).logits  # fmt: skip


CASES = [
    (family, attention)
    for family in ISOLATING
    for attention in ("eager", "sdpa")
    if attention == "eager" or family not in ONLY_EAGER
]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_a_document_does_not_depend_on_its_neighbours(family, attention):
    model = tiny(family, ISOLATING[family], attention)
    check_isolation(model)
    generator = torch.Generator().manual_seed(1)
    ids_NT = torch.randint(64, (2, 20), generator=generator)
    starts = [(0, 9, 14), (0, 1, 12)]
    positions_NT = torch.stack(
        [torch.arange(20) - torch.tensor([max(s for s in row if s <= t) for t in range(20)])
         for row in starts]
    )  # fmt: skip
    rows = TokenRows(ids_NT, positions_NT)
    before = logits(model, rows)
    for row in range(2):
        for start, end in zip(starts[row], (*starts[row][1:], 20), strict=True):
            inside = slice(start, end)
            changed = ids_NT.clone()
            changed[row] = (ids_NT[row] + 17) % 64
            changed[row, inside] = ids_NT[row, inside]
            after = logits(model, TokenRows(changed, positions_NT))
            assert torch.equal(after[row, inside], before[row, inside])
            # Other shapes are summed in another order: measured at most 2e-7, logits around 0.5.
            alone = logits(model, TokenRows.whole(ids_NT[row : row + 1, inside]))
            torch.testing.assert_close(before[row, inside], alone[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_calibration_sees_documents_one_by_one(family):
    """Every layer's Hessian over packed rows is that of its documents, each run by itself."""
    model = tiny(family, ISOLATING[family])
    generator = torch.Generator().manual_seed(1)
    ids_NT = torch.randint(64, (4, 12), generator=generator)
    lengths = [(5, 7), (12,), (1, 2, 9), (11, 1)]
    positions_NT = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    hessians = {}
    walk_blocks(
        BlocksInMemory(model), TokenRows(ids_NT, positions_NT),
        lambda layer: hessians.update({layer.name: layer.moments.hessian_II}), comm=Comm.single(),
        memory=Memory(3), needs=SolverNeeds(),
    )  # fmt: skip
    inputs = {name: [] for name in hessians}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].flatten(0, 1).double())
        )
        for name in hessians
    ]
    for row, parts in zip(ids_NT, lengths, strict=True):
        for document in row.split(list(parts)):
            with torch.no_grad():
                model(input_ids=document[None], use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(hessians) == 14
    for name, hessian_II in hessians.items():
        x_TI = torch.cat(inputs[name])
        expected = x_TI.T @ x_TI / 48
        # float32 sums of 48 products: measured at most 3.1e-7 of the largest element.
        assert (hessian_II - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("family", LEAKING)
def test_models_that_do_not_isolate_are_refused(family):
    model = tiny(family, LEAKING[family])
    ids_NT = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(1))
    rows = TokenRows(ids_NT, torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).repeat(2, 1))
    model.train()
    with pytest.raises(InputError, match=r"see each other.*data.isolate_documents=false"):
        evaluate_rows(model, rows, 2)
    assert model.training
    assert evaluate_rows(model, TokenRows.whole(ids_NT), 2).num_tokens == 14


def test_a_model_without_positions_is_refused(tiny_model):
    forward = tiny_model.forward
    tiny_model.forward = lambda input_ids, use_cache: forward(input_ids)
    with pytest.raises(InputError, match="takes no position_ids"):
        check_isolation(tiny_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_leak_but_a_small_leak_is(tiny_model, dtype):
    """Noise of the size of rounding passes; one head that attends across documents does not."""
    model = copy.deepcopy(tiny_model).to(dtype)
    forward = model.forward

    def noisy(**inputs):
        output = forward(**inputs)
        noise = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(
            int(inputs["input_ids"].sum())))  # fmt: skip
        output.logits *= 1 + noise.to(dtype) * torch.finfo(dtype).eps
        return output

    model.forward = noisy
    check_isolation(model)

    def leaking(**inputs):
        whole = forward(input_ids=inputs["input_ids"]).logits
        output = forward(**inputs)
        output.logits += 0.25 * whole
        return output

    model.forward = leaking
    with pytest.raises(InputError, match="see each other"):
        check_isolation(model)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_named(family):
    names = fused_experts(tiny(family, ISOLATING[family]))
    assert names == [
        f"model.layers.{block}.mlp.experts.{name}"
        for block in range(2)
        for name in ("gate_up_proj", "down_proj")
    ]


def test_models_without_experts_have_none():
    assert fused_experts(tiny("llama", {})) == []
    changes = {
        "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, **EXPERTS,
    }  # fmt: skip
    names = fused_experts(tiny("qwen3_next", changes))
    assert names
    assert not any("conv" in name for name in names)  # kernels of three dimensions
