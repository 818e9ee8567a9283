"""Dense-or-sparse allocation: the choice against brute force, costs by hand, damage by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import transformers
from torch import nn

from sparsify.costs.roofline import Device, matrix_bytes, matrix_latency
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError, NonFiniteError
from sparsify.masks.select import keep_mask_from_scores
from sparsify.pattern import Pattern
from sparsify.pruning.budget import allocate, choose_dense, sensitivities

TWO_FOUR = Pattern.parse("2:4")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def packed_rows() -> TokenRows:
    ids = torch.randint(32, (5, 10), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(10).repeat(5, 1)
    positions[:, 4:] -= 4
    return TokenRows(ids, positions)


def pruned_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every linear of the blocks, by magnitude."""
    pruned = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            pruned[f"model.layers.{name}"] = weight * keep_mask_from_scores(weight.abs(), TWO_FOUR)
    return pruned


class TestCosts:
    def test_bytes_of_2_4_are_nine_sixteenths_in_bfloat16(self) -> None:
        dense = matrix_bytes((4096, 14336))
        assert dense == 4096 * 14336 * 2
        # Half the values and two bits for each of them.
        assert matrix_bytes((4096, 14336), TWO_FOUR) == dense * (0.5 + 2 / 32)

    @pytest.mark.parametrize(
        ("pattern", "bits", "expected"),
        [("2:4", 4, 64 * 6), ("2:4", 8, 64 * 10), ("4:8", 16, 64 * 19), ("1:2", 16, 64 * 17),
         ("unstructured:0.75", 16, 32 * 16 + 128)],
    )  # fmt: skip
    def test_bits_of_a_row(self, pattern: str, bits: int, expected: int) -> None:
        assert matrix_bytes((3, 128), Pattern.parse(pattern), bits) == 3 * expected / 8

    def test_decoding_is_bound_by_memory_and_prefill_by_arithmetic(self) -> None:
        shape, device = (4096, 4096), Device()
        bandwidth = device.bandwidth_bytes_per_s
        assert matrix_latency(shape) == matrix_bytes(shape) / bandwidth
        decode = matrix_latency(shape, TWO_FOUR) / matrix_latency(shape)
        assert decode == pytest.approx(9 / 16)
        prefill = [matrix_latency(shape, p, num_tokens=8192) for p in (None, TWO_FOUR)]
        assert prefill[0] == 2 * 8192 * 4096 * 4096 / device.dense_flops_per_s
        assert prefill[1] == prefill[0] / 2
        unstructured = matrix_latency(shape, Pattern.parse("unstructured:0.5"), num_tokens=8192)
        assert unstructured == prefill[0], "no hardware skips the zeros of an unstructured matrix"

    def test_refusals(self) -> None:
        with pytest.raises(InputError, match="6 input columns"):
            matrix_bytes((4, 6), TWO_FOUR)
        with pytest.raises(InputError, match="weight_bits=0"):
            matrix_bytes((4, 8), None, 0)
        with pytest.raises(InputError, match="num_tokens=0"):
            matrix_latency((4, 8), num_tokens=0)


def brute_force(damage: dict, dense: dict, sparse: dict, budget: float) -> float:
    """Most damage avoided by any subset within the budget."""
    names, best = list(damage), 0.0
    limit = budget * math.fsum(dense.values()) * (1 + 1e-12)
    for flags in itertools.product((False, True), repeat=len(names)):
        cost = math.fsum(dense[n] if f else sparse[n] for n, f in zip(names, flags, strict=True))
        if cost <= limit:
            best = max(best, math.fsum(damage[n] for n, f in zip(names, flags, strict=True) if f))
    return best


class TestChoice:
    @pytest.mark.parametrize("seed", range(30))
    @pytest.mark.parametrize("whole", [True, False])
    def test_equals_brute_force(self, seed: int, whole: bool) -> None:
        draw = random.Random(seed)
        names = [f"m{i}" for i in range(9)]
        dense = {n: 16.0 * draw.randint(1, 40) if whole else draw.uniform(1, 40) for n in names}
        # Of all whole numbers here 16 x 9/16 is one too.
        sparse = {n: cost * 9 / 16 for n, cost in dense.items()}
        damage = {n: draw.choice([draw.random(), draw.random() ** 4, -0.01]) for n in names}
        budget = draw.uniform(0.5625, 1.0)
        chosen = choose_dense(damage, dense, sparse, budget)
        cost = math.fsum(dense[n] if n in chosen else sparse[n] for n in names)
        assert cost <= budget * math.fsum(dense.values()) * (1 + 1e-9)
        assert chosen == [n for n in names if n in chosen]
        best = brute_force(damage, dense, sparse, budget)
        # 9 roundings up of 1e-5 of the capacity: no case of these has a subset that close to it.
        assert math.fsum(damage[n] for n in chosen) == pytest.approx(best, rel=1e-12)

    def test_stated_bound_holds_for_thousands_of_matrices(self) -> None:
        """With rounding up, against the greedy fractional optimum, which no subset can beat."""
        draw = random.Random(0)
        names = [f"m{i}" for i in range(1000)]
        dense = {n: draw.uniform(1, 40) for n in names}
        sparse = {n: cost * 9 / 16 for n, cost in dense.items()}
        damage = {n: draw.random() * dense[n] ** draw.uniform(0, 2) for n in names}
        chosen = choose_dense(damage, dense, sparse, 0.7)
        found = math.fsum(damage[n] for n in chosen)
        left = (0.7 - 9 / 16) * math.fsum(dense.values()) * (1 - 1000 / 100_000)
        bound = 0.0
        for name in sorted(names, key=lambda n: -damage[n] / (dense[n] * 7 / 16)):
            share = min(1.0, left / (dense[name] * 7 / 16))
            bound += share * damage[name]
            left -= share * dense[name] * 7 / 16
            if left <= 0:
                break
        assert found >= bound - max(damage.values())
        cost = math.fsum(dense[n] if n in set(chosen) else sparse[n] for n in names)
        assert cost <= 0.7 * math.fsum(dense.values()) * (1 + 1e-9)

    def test_shapes_of_a_large_model_are_solved_exactly_in_whole_units(self) -> None:
        """Equal costs: the optimum is the most damaging ones, however large the costs."""
        names = [f"m{i}" for i in range(300)]
        dense = dict.fromkeys(names, float(8192 * 28672 * 2))
        sparse = {n: cost * 9 / 16 for n, cost in dense.items()}
        damage = {n: math.sin(7.0 * i) + 1 for i, n in enumerate(names)}
        chosen = choose_dense(damage, dense, sparse, 9 / 16 + 7 / 16 * 100 / 300)
        assert set(chosen) == set(sorted(names, key=lambda n: -damage[n])[:100])

    def test_ends_of_the_budget(self) -> None:
        damage, dense = {"a": 1.0, "b": 2.0, "c": 0.0}, {"a": 16.0, "b": 16.0, "c": 16.0}
        sparse = dict.fromkeys(damage, 9.0)
        assert choose_dense(damage, dense, sparse, 27 / 48) == []
        assert choose_dense(damage, dense, sparse, 34 / 48) == ["b"]
        assert choose_dense(damage, dense, sparse, 1.0) == ["a", "b"]
        with pytest.raises(InputError, match=r"budget=0.5: .*from 0.5625 .*to 1"):
            choose_dense(damage, dense, sparse, 0.5)
        with pytest.raises(InputError, match=r"budget=1.01"):
            choose_dense(damage, dense, sparse, 1.01)
        with pytest.raises(InputError, match="budget=nan"):
            choose_dense(damage, dense, sparse, math.nan)

    def test_a_matrix_that_pruning_does_not_make_cheaper_stays_dense(self) -> None:
        chosen = choose_dense(
            {"a": 0.1, "b": 9.0}, {"a": 4.0, "b": 16.0}, {"a": 5.0, "b": 9.0}, 0.75
        )
        assert chosen == ["a"]

    def test_bad_damage_and_names(self) -> None:
        cost = {"a": 2.0}
        with pytest.raises(NonFiniteError, match="a: the damage of pruning it is nan"):
            choose_dense({"a": math.nan}, cost, {"a": 1.0}, 1.0)
        with pytest.raises(InputError, match="same matrices"):
            choose_dense({"a": 1.0}, cost, {"b": 1.0}, 1.0)


class TestDamage:
    @torch.no_grad()
    def test_is_the_kl_with_one_matrix_swapped(self) -> None:
        model, rows = tiny(), packed_rows()
        pruned = pruned_weights(model)
        seen: list[tuple[int, int]] = []
        found = sensitivities(model, rows, pruned, 2, lambda *done: seen.append(done))
        assert list(found) == list(pruned) and seen[-1] == (3 * 14, 3 * 14)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            changed = tiny()
            changed.get_submodule(name).weight.data = pruned[name]
            total, count = 0.0, 0
            for row in range(5):
                for part in (slice(0, 4), slice(4, 10)):  # each document by itself
                    ids = rows.ids_NT[row : row + 1, part]
                    log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                    log_q = changed(input_ids=ids).logits[0, :-1].log_softmax(-1)
                    total += float((log_p.exp() * (log_p - log_q)).sum())
                    count += len(log_p)
            # Log-probabilities in float32: measured 2e-8 on 0.3.
            assert found[name] == pytest.approx(total / count, rel=1e-5)

    @torch.no_grad()
    def test_from_the_sparse_end_it_is_the_kl_that_one_dense_matrix_saves(self) -> None:
        model, rows = tiny(), TokenRows.whole(packed_rows().ids_NT)
        pruned = pruned_weights(model)
        found = sensitivities(model, rows, pruned, 2, from_sparse=True)
        name = "model.layers.1.self_attn.v_proj"

        def kl_with(dense_names: tuple[str, ...]) -> float:
            changed = tiny()
            for other, weight in pruned.items():
                if other not in dense_names:
                    changed.get_submodule(other).weight.data = weight
            log_p = model(input_ids=rows.ids_NT).logits[:, :-1].log_softmax(-1)
            log_q = changed(input_ids=rows.ids_NT).logits[:, :-1].log_softmax(-1)
            return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

        # The difference of two float32 figures.
        assert found[name] == pytest.approx(kl_with(()) - kl_with((name,)), rel=1e-4)

    @pytest.mark.parametrize("from_sparse", [True, False])
    def test_model_is_left_as_it_was(self, from_sparse: bool) -> None:
        model, same = tiny().train(), tiny()
        pruned = pruned_weights(model)
        pruned["model.layers.0.mlp.up_proj"] = same.model.layers[0].mlp.up_proj.weight.detach()
        found = sensitivities(model, packed_rows(), pruned, 5, from_sparse=from_sparse)
        assert found["model.layers.0.mlp.up_proj"] == 0.0
        assert model.training
        for one, other in zip(model.parameters(), same.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_refusals(self) -> None:
        model, rows = tiny(), packed_rows()
        with pytest.raises(InputError, match=r"model\.norm is no linear layer"):
            sensitivities(model, rows, {"model.norm": torch.ones(16)}, 2)
        with pytest.raises(InputError, match="nowhere is no linear layer"):
            sensitivities(model, rows, {"nowhere": torch.ones(16)}, 2)
        name = "model.layers.0.self_attn.q_proj"
        with pytest.raises(InputError, match=r"shape \(16, 16\), its pruned weight \(4, 4\)"):
            sensitivities(model, rows, {name: torch.ones(4, 4)}, 2)
        with pytest.raises(NonFiniteError, match=name):
            sensitivities(model, rows, {name: torch.full((16, 16), math.nan)}, 2)
        with pytest.raises(InputError, match="0 rows"):
            sensitivities(model, rows[:0], pruned_weights(model), 2)


class TestAllocate:
    @pytest.mark.parametrize("kind", ["size", "latency"])
    def test_decoding_latency_and_size_choose_alike(self, kind: str) -> None:
        model, rows = tiny(), packed_rows()
        pruned = pruned_weights(model)
        result = allocate(model, rows, pruned, kind, 0.75, pattern=TWO_FOUR, batch_size=5)
        assert result.least_share == pytest.approx(9 / 16)
        assert 0.7 < result.cost_share <= 0.75 + 1e-9
        assert set(result.damages) == set(pruned)
        sizes = {name: weight.numel() * 2.0 for name, weight in pruned.items()}
        sparse = {name: size * 9 / 16 for name, size in sizes.items()}
        assert result.dense_names == choose_dense(result.damages, sizes, sparse, 0.75)

    def test_damage_is_taken_between_both_ends(self) -> None:
        model, rows = tiny(), packed_rows()
        pruned = pruned_weights(model)
        seen: list[tuple[int, int]] = []
        result = allocate(
            model, rows, pruned, "size", 0.6, pattern=TWO_FOUR, batch_size=5,
            on_batch=lambda *done: seen.append(done),
        )  # fmt: skip
        assert seen == [(done, 28) for done in range(1, 29)]
        ends = [sensitivities(model, rows, pruned, 5, from_sparse=end) for end in (False, True)]
        t = (0.6 - 9 / 16) / (1 - 9 / 16)
        for name, damage in result.damages.items():
            assert damage == pytest.approx(t * ends[0][name] + (1 - t) * ends[1][name])

    def test_an_impossible_budget_is_refused_before_measuring(self) -> None:
        model = tiny()
        pruned = pruned_weights(model)
        model.forward = None
        with pytest.raises(InputError, match=r"budget=0.3: .*0.5625"):
            allocate(model, packed_rows(), pruned, "size", 0.3, pattern=TWO_FOUR, batch_size=5)
        with pytest.raises(InputError, match="budget_kind=flops"):
            allocate(model, packed_rows(), pruned, "flops", 0.7, pattern=TWO_FOUR, batch_size=5)
