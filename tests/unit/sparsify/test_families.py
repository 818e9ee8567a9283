"""Every family of the table: its config is read, its blocks are found, called and pruned, or not.

Small models with random weights; what needs more than a moment uses those of tests/families.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jobs.benchmarks.support.families import (
    FAMILIES,
    SKIP,
    family_config,
    random_family,
)
from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.layers import prunable_linears
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.masks.select import find_violation
from sparsify.methods import PruneParams, get_method
from sparsify.models.calls import BlockCalls, run_block, run_model
from sparsify.models.isolation import require_causal
from sparsify.models.lm_head import check_head
from sparsify.models.load import read_config
from sparsify.models.structure import base_of, find_blocks
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, prune_model
from tests.families import in_two_documents, token_rows

PATTERN = Pattern.parse("2:4")
BOTH_SIDES = "tokens see the tokens after them"
REFUSED = {
    "bert-generation": BOTH_SIDES, "cpmant": BOTH_SIDES, "xlm": "several lists of modules",
    "gpt2": "Conv1D, whose weights are stored transposed", "openai-gpt": "Conv1D",
    "jamba": "of 2 classes", "olmo_hybrid": "of 2 classes",
}  # fmt: skip
REMEMBERS = ("gemma4_text",)  # a dict in which blocks leave keys and values for later ones
NO_HEAD = {
    "bert": "its logits are not what its head", "modernbert-decoder": "its logits are not what",
}  # fmt: skip


def prune(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model = random_family(family)
    result = prune_model(
        model, token_rows(8), get_method("magnitude"), PATTERN, PruneParams(), comm=Comm.single(),
        memory=Memory(8), layers=LayerChoice(SKIP.get(family, ())),
    )  # fmt: skip
    return model, result.keep_masks


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - REFUSED.keys()))
def test_blocks_are_found_and_called_and_all_of_their_layers_pruned(family: str) -> None:
    dense = random_family(family)
    list_name, blocks = find_blocks(dense)
    assert len(blocks) == family_config(family).get_text_config().num_hidden_layers
    rows, seen = token_rows(2), []
    handle = blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    run_model(dense, rows)
    handle.remove()
    calls = BlockCalls(dense, blocks)
    calls.learn(blocks[0], rows[:1])
    hidden_BTD, given = calls.all(rows)
    assert torch.equal(hidden_BTD, calls.first(rows).hidden_BTD)
    assert given.is_constant or family in REMEMBERS
    for index, block in enumerate(blocks):
        call = calls.call(index, rows, hidden_BTD)
        hidden_BTD = run_block(block, call)
        if given.is_constant:
            for _ in range(2):  # no block changes what it is given
                kept = given.call(index, call.hidden_BTD)
                assert torch.equal(run_block(block, kept), hidden_BTD)
    assert torch.equal(hidden_BTD, seen[0][0] if isinstance(seen[0], tuple) else seen[0])

    model, masks = prune(family)
    skipped = SKIP.get(family, ())
    assert set(masks) == {name for _, name, _ in prunable_linears(dense, skipped)}
    for name, weight in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in masks:
            assert name.startswith(f"{list_name}.")
            assert find_violation(weight, PATTERN) is None
            assert masks[layer].float().mean() == 0.5
        else:
            assert torch.equal(weight, dense.get_parameter(name)), f"{name} is not to be pruned"


def test_blocks_that_are_gone_through_again_are_refused() -> None:
    """HRM runs its two stacks in turns, so that one pass over a stack is not what it computes."""
    model = random_family("hrm_text")
    blocks = model.get_submodule("model.L_module.layers")
    with torch.no_grad(), pytest.raises(InputError, match=r"block 0 is not called once"):
        BlockCalls(model, blocks).learn(blocks[0], token_rows(1))
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_pre_hooks


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_pruned_is_refused_in_one_line(family: str) -> None:
    with pytest.raises(InputError, match=REFUSED[family]) as caught:
        prune(family)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - REFUSED.keys()))
def test_heads_are_found_or_refused(family: str) -> None:
    model = random_family(family)
    if family in NO_HEAD:
        with pytest.raises(InputError, match=NO_HEAD[family]):
            check_head(model)
        return
    found = check_head(model)
    assert found.linear is model.get_output_embeddings()
    assert found.base is base_of(model)


@pytest.mark.parametrize(
    ("family", "soft_cap"), [("recurrent_gemma", 30.0), ("xlstm", 30.0), ("gemma2", 30.0)]
)
def test_soft_caps_go_by_several_names(family: str, soft_cap: float) -> None:
    assert check_head(random_family(family)).transform.soft_cap == soft_cap


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_are_read(family: str, tmp_path: Any) -> None:
    """Also those that say is_decoder=false and mean nothing by it, such as GPT-NeoX."""
    config = family_config(family)
    config.save_pretrained(tmp_path)
    assert type(read_config(tmp_path)) is type(config)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("bert", {}), ("roberta", {}), ("electra", {}), ("bart", {"is_decoder": True}),
        ("whisper", {}), ("t5", {}), ("gpt_neox", {"is_encoder_decoder": True}),
    ],
)  # fmt: skip
def test_encoders_are_refused(model_type: str, changes: dict[str, Any], tmp_path: Any) -> None:
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[model_type](**changes).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"'{model_type}' is no causal language model"):
        read_config(tmp_path)


def test_a_later_token_must_not_be_seen_beyond_rounding() -> None:
    def run(share: float) -> Any:
        def forward(rows: TokenRows) -> torch.Tensor:
            x_NT = rows.ids_NT.float()
            return x_NT.cumsum(1) + share * x_NT.sum(1, keepdim=True)

        return forward

    require_causal(run(0.0), 64, "sum")
    require_causal(run(1e-6), 64, "sum with rounding")
    with pytest.raises(InputError, match="leak: tokens see the tokens after them"):
        require_causal(run(0.01), 64, "leak")


def test_rows_are_cut_in_two() -> None:
    rows = in_two_documents(token_rows(5, 6))
    assert [(row == 0).nonzero().flatten().tolist() for row in rows.positions_NT] == [
        [0, 2], [0, 3], [0, 4], [0, 5], [0, 2],
    ]  # fmt: skip
    assert rows.is_joined
