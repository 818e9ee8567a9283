"""Layers taken out: chosen, cut from configurations and files, proved, and refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sparsify.data.rows import TokenRows
from sparsify.distillation.student import states_of_layers
from sparsify.dropping import Task, Unit, available_rules, get_rule
from sparsify.dropping.greedy import candidates, merged
from sparsify.errors import CorruptCheckpointError, InputError
from sparsify.evaluation.divergence import forward_kl
from sparsify.models.blocks import Blocks, BlocksInMemory, BlocksOnDisk, reason_to_hold_whole
from sparsify.models.calls import BlockCalls
from sparsify.models.fewer_layers import cut_config, prove_fewer, stored_prefix, write_fewer
from sparsify.models.load import load_model
from sparsify.models.sublayers import output_layers, require_residual, sublayers_of
from tests.conftest import message
from tests.families import tiny, token_rows

KEPT = [0, 2, 3]


def of(family: str) -> Any:
    """A tiny model of five layers with kinds of attention and experts, as the family has them."""
    if family == "Gemma3Text":
        config = transformers.Gemma3TextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        )  # fmt: skip
        torch.manual_seed(0)
        return transformers.Gemma3ForCausalLM(config).eval()
    if family == "Mixtral":
        config = transformers.MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, sliding_window=None,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(config).eval()
    return tiny(family, num_layers=5)


def without(model: Any, gone: Sequence[int]) -> Any:
    """The model with the layers taken out of its list, by hand."""
    short = copy.deepcopy(model)
    base = short.gpt_neox if hasattr(short, "gpt_neox") else short.model
    base = getattr(base, "decoder", base)  # OPT
    kept = [at for at in range(len(base.layers)) if at not in gone]
    base.layers = nn.ModuleList([base.layers[at] for at in kept])
    config = short.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[at] for at in kept]
    return short


def blocks_of(folder: Path) -> Blocks:
    if reason_to_hold_whole(folder) is None:
        return BlocksOnDisk(folder, with_head=True)
    return BlocksInMemory(load_model(folder))


@torch.no_grad()
def logits(model: Any, rows: TokenRows) -> torch.Tensor:
    return model(input_ids=rows.ids_NT, use_cache=False).logits


@pytest.mark.parametrize(
    "family", ["Llama", "Qwen3", "Gemma2", "Gemma3Text", "GPTNeoX", "Mixtral", "OPT"]
)
def test_a_shorter_checkpoint_computes_what_the_shorter_list_does(
    family: str, tmp_path: Path
) -> None:
    model, rows = of(family), token_rows(2, 12)
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    write_fewer(tmp_path / "whole", tmp_path / "short", KEPT)
    prove_fewer(blocks_of(tmp_path / "whole"), blocks_of(tmp_path / "short"), KEPT)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    if family != "OPT":  # whose list is elsewhere
        assert torch.equal(logits(made, rows), logits(without(model, [1, 4]), rows))
    assert not torch.equal(logits(made, rows), logits(model, rows))
    assert made.config.num_hidden_layers == 3
    common: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    mask = torch.ones_like(rows.ids_NT)
    written = made.generate(rows.ids_NT, attention_mask=mask, **common)
    again = made.generate(rows.ids_NT, attention_mask=mask, use_cache=False, **common)
    assert torch.equal(written, again), "the cache goes by the layers' new numbers"


def test_kinds_of_attention_go_with_their_layers(tmp_path: Path) -> None:
    of("Gemma3Text").save_pretrained(tmp_path / "whole")
    write_fewer(tmp_path / "whole", tmp_path / "short", [1, 3, 4])
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    config["layer_types"][0] = "sliding_attention"
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptCheckpointError, match="layer 0 of what was written does not comp"):
        prove_fewer(blocks_of(tmp_path / "whole"), blocks_of(tmp_path / "short"), [1, 3, 4])


def test_lists_by_layer_are_cut_and_others_are_left() -> None:
    text = transformers.Qwen3MoeConfig(num_hidden_layers=3, mlp_only_layers=[0, 2])
    text.eos_token_id = [1, 2, 3]
    cut = cut_config(text, [1, 2])
    assert (cut.mlp_only_layers, cut.num_hidden_layers) == ([1], 2)
    assert cut.eos_token_id == [1, 2, 3]
    assert text.num_hidden_layers == 3, "the given one stays as it is"
    nested = transformers.Gemma3Config(text_config={"num_hidden_layers": 6})
    kinds = nested.text_config.layer_types
    cut = cut_config(nested, [4, 5])
    assert cut.text_config.layer_types == kinds[4:]
    assert cut.text_config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("wavelengths", [1.0, 2.0, 3.0], "config.json: wavelengths has 3 entries"),
        ("num_kv_shared_layers", 2, "config.json: num_kv_shared_layers=2: layers use what others"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(name: str, value: Any, said: str) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=3)
    setattr(config, name, value)
    with pytest.raises(InputError) as error:
        cut_config(config, [0, 1])
    assert message(error).startswith(said)


def test_kinds_of_layers_that_go_by_number_are_refused(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2, pad_token_id=0,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(InputError, match=r"kinds of layers go by their number here; choose other"):
        write_fewer(tmp_path / "whole", tmp_path / "short", [0, 2])
    write_fewer(tmp_path / "whole", tmp_path / "short", [0, 3])


def test_names_of_stored_layers() -> None:
    def names(*prefixes: str) -> list[str]:
        return [f"{prefix}{at}.w" for prefix in prefixes for at in range(2)]

    assert stored_prefix(names("model.layers.", "vision.layers."), "model.layers", 2) == (
        "model.layers."
    )
    assert stored_prefix(names("layers."), "model.layers", 2) == "layers."
    with pytest.raises(InputError, match="the checkpoint has 2 lists of 2 numbered layers"):
        stored_prefix(names("a.layers.", "b.layers."), "model.layers", 2)


def test_deepest_are_the_last_but_one_and_those_before() -> None:
    task = Task(8, 3, lambda: pytest.fail("the model is not run"))
    assert get_rule("deepest").choose(task).units == (Unit(4), Unit(5), Unit(6))
    assert set(available_rules()) == {"angular", "deepest", "greedy"}


def brute_force(model: Any, rows: TokenRows, units: Sequence[Unit]) -> dict[Unit, float]:
    """KL per token without each unit, in float64, from copies of the model."""
    full = logits(model, rows).double().log_softmax(-1)
    found = {}
    for unit in units:
        if unit.part == "layers":
            short = without(model, [unit.layer])
        else:
            short = copy.deepcopy(model)
            layer = short.model.layers[unit.layer]
            last = layer.self_attn.o_proj if unit.part == "attention" else layer.mlp.down_proj
            last.weight.data.zero_()
        other = logits(short, rows).double().log_softmax(-1)
        found[unit] = float((full.exp() * (full - other)).sum(-1).mean())
    return found


@pytest.mark.parametrize("parts", [["layers"], ["attention", "mlp"], ["layers", "mlp"]])
def test_greedy_finds_what_brute_force_does(parts: list[str]) -> None:
    model, rows = tiny("Llama", num_layers=4), token_rows(6)
    for layer, block in enumerate(model.model.layers):  # layers that differ in what they do
        for name, weight in block.named_parameters():
            if "proj" in name:
                weight.data *= 3 + 2 * ((layer * 7) % 4)
    task = Task(
        4, 1, lambda: BlocksInMemory(model), rows, parts=parts, batch_size=4, divergence=forward_kl
    )  # fmt: skip
    choice = get_rule("greedy").choose(task)
    figures = choice.figures["rounds"][0]
    expected = brute_force(model, rows, candidates(4, parts, []))
    for one in figures["candidates"]:
        # float32 logits of batches of 4 and of 6 rows; the smallest KL here is above 1e-4
        assert one["kl"] == pytest.approx(expected[Unit(one["layer"], one["part"])], rel=2e-3)
    assert choice.units == (min(expected, key=lambda unit: expected[unit]),)


def test_greedy_goes_on_from_what_is_gone(tmp_path: Path) -> None:
    """The second round is the first of the model without what the first one dropped."""
    model, rows = tiny("Gemma2", num_layers=4), token_rows(4)
    common: dict[str, Any] = {"batch_size": 4, "divergence": forward_kl}
    task = Task(4, 2, lambda: BlocksInMemory(model), rows, state=tmp_path / "rounds", **common)
    choice = get_rule("greedy").choose(task)
    rounds = choice.figures["rounds"]
    first = rounds[0]["unit"]["layer"]
    full = logits(model, rows)
    for one in rounds[1]["candidates"]:
        kl = forward_kl(logits(without(model, [first, one["layer"]]), rows), full)
        assert one["kl"] == pytest.approx(float(kl), rel=1e-5), "as if both were gone"
    assert json.loads((tmp_path / "rounds").read_text()) == rounds
    # Killed after the first round: that round is not done again.
    (tmp_path / "rounds").write_text(json.dumps(rounds[:1]))
    steps: list[tuple[int, int, str]] = []
    task.on_step = lambda *step: steps.append(step)
    assert get_rule("greedy").choose(task) == choice
    assert steps == [(done, 3, "forwards of choice 2 of 2") for done in (1, 2, 3)]


def test_candidates_never_take_the_last_layer() -> None:
    parts = ["attention", "mlp"]
    gone = [Unit(0, "attention"), Unit(0, "mlp"), Unit(1, "mlp")]
    assert candidates(2, parts, gone) == [], "the attention of 1 is all that is left"
    assert candidates(2, parts, gone[:2]) == [Unit(1, "attention"), Unit(1, "mlp")]
    assert merged(gone) == (Unit(0), Unit(1, "mlp"))
    assert candidates(3, ["layers"], [Unit(1)]) == [Unit(0), Unit(2)]
    assert candidates(2, ["layers"], [Unit(1)]) == []


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi", "GPTNeoX", "Mixtral", "OPT"])
def test_a_sublayer_is_left_out_by_zeros(family: str, tmp_path: Path) -> None:
    of(family).save_pretrained(tmp_path / "whole")
    model, rows = load_model(tmp_path / "whole"), token_rows(2)
    blocks = BlocksInMemory(model)
    calls = BlockCalls(model, blocks.blocks)
    calls.learn(blocks.open(0), rows)
    hidden_BTD, arguments = calls.all(rows)
    block, call = blocks.open(1), arguments.call(1, hidden_BTD)
    before = {name: weight.clone() for name, weight in block.state_dict().items()}
    require_residual(block, call, family)
    quiet = sublayers_of(block, family)
    zeroed = [
        f"{blocks.list_name}.1.{layer}"
        for part in quiet.values()
        for layer in output_layers(block, part, call, family)
    ]
    assert len(zeroed) == (5 if family == "Mixtral" else 2), "the last of each; of each expert"
    assert all(torch.equal(weight, before[n]) for n, weight in block.state_dict().items())
    names = [f"{layer}.{kind}" for layer in zeroed for kind in ("weight", "bias")]
    write_fewer(tmp_path / "whole", tmp_path / "short", [0, 1, 3], names)
    pair = blocks_of(tmp_path / "whole"), blocks_of(tmp_path / "short")
    prove_fewer(*pair, [0, 1, 3], {1: list(quiet.values())})
    made = load_model(tmp_path / "short")
    short_calls = BlockCalls(made, BlocksInMemory(made).blocks)
    short_calls.learn(BlocksInMemory(made).blocks[0], rows)
    own = BlocksInMemory(made).blocks[1]
    require_residual(own, call, family)
    assert torch.equal(logits(made, rows), logits(without(model, [1, 2, 4]), rows))


@pytest.mark.parametrize(
    "parts", [["self_attn", "cross_attn", "mlp"], ["self_attn", "mlp", "fc"], ["self_attn"]]
)
def test_a_block_without_two_parts_is_refused_by_name(parts: list[str]) -> None:
    block = torch.nn.ModuleDict(
        {
            part: torch.nn.Linear(4, 4)
            if part == "fc"
            else torch.nn.Sequential(torch.nn.Linear(4, 4))
            for part in parts
        }
    )
    with pytest.raises(InputError) as error:
        sublayers_of(block, "OddForCausalLM")
    assert message(error).startswith(
        f"OddForCausalLM: the linear layers of its blocks are in {', '.join(parts)}, which are not"
    )


def test_states_of_a_teacher_that_has_more_layers() -> None:
    states = tuple(torch.tensor(float(at)) for at in range(6))
    found = states_of_layers(states, [0, 3])
    assert [int(state) for state in found] == [0, 1, 5], "the last is behind the norm in both"
