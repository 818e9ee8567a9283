"""Angular distances against the paper's formula, written as it stands there, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsify.data.rows import TokenRows
from sparsify.dropping import Task, Unit, get_rule
from sparsify.dropping.angular import angle_sums, final_tokens
from sparsify.models.blocks import BlocksInMemory
from tests.families import tiny, token_rows


def residual_stream(model: nn.Module, ids_NT: torch.Tensor) -> list[torch.Tensor]:
    """x_0 to x_L at the last token, by hooks on the layers and on the norm behind them."""
    found: list[torch.Tensor] = []
    parts = [*model.model.layers, model.model.norm]
    hooks = [
        part.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for part in parts
    ]
    with torch.no_grad():
        model(input_ids=ids_NT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [hidden[:, -1] for hidden in found]


def naive(x: list[torch.Tensor], layer: int, size: int) -> float:
    """Equation 7, in Python's own arithmetic, a row at a time."""
    total, rows = 0.0, len(x[0])
    for row in range(rows):
        a, b = x[layer][row].tolist(), x[layer + size][row].tolist()
        dot = math.fsum(p * q for p, q in zip(a, b, strict=True))
        norms = math.sqrt(math.fsum(p * p for p in a)) * math.sqrt(math.fsum(q * q for q in b))
        total += math.acos(max(-1.0, min(1.0, dot / norms))) / math.pi
    return total / rows


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Qwen3"])
def test_distances_are_those_of_the_formula(family: str) -> None:
    model, rows = tiny(family, num_layers=5), token_rows(7)
    x = residual_stream(model, rows.ids_NT)
    task = Task(5, 2, lambda: BlocksInMemory(model), rows, batch_size=3)
    choice = get_rule("angular").choose(task)
    distances = choice.figures["distances"]
    assert [len(of_size) for of_size in distances] == [5, 4, 3, 2, 1]
    for size, of_size in enumerate(distances, 1):
        for layer, distance in enumerate(of_size):
            # Batches of 3 and of 7 rows round differently in float32: 1e-6 of a distance.
            assert distance == pytest.approx(naive(x, layer, size), rel=1e-4, abs=1e-7)
    first = distances[1].index(min(distances[1]))
    assert choice.units == (Unit(first), Unit(first + 1))


def test_the_last_place_is_before_the_final_norm() -> None:
    model, rows = tiny("Llama", num_layers=3), token_rows(2)
    model.model.norm.weight.data = torch.linspace(-3, 3, 32)
    x_XND = final_tokens(BlocksInMemory(model), Task(3, 1, lambda: BlocksInMemory(model), rows))
    with torch.no_grad():
        normed = model(input_ids=rows.ids_NT, output_hidden_states=True).hidden_states[-1][:, -1]
        torch.testing.assert_close(model.model.norm(x_XND[-1]), normed)
    assert not torch.allclose(x_XND[-1], normed)


def test_parallel_and_opposite_vectors_are_exact() -> None:
    """Where the arccos is steep: rounding must not make a NaN, nor a float32 an angle."""
    one = torch.rand(64, generator=torch.Generator().manual_seed(0))
    x_XND = torch.stack([one, 3 * one, -one])[:, None]
    found = angle_sums(x_XND)
    assert found[0, 1] < 1e-7
    assert found[0, 2] == pytest.approx(1, abs=1e-7)
    right = angle_sums(torch.tensor([[[1.0, 0.0]], [[0.0, 5.0]]]))
    assert right[0, 1] == pytest.approx(0.5, abs=1e-15)


def test_sums_of_shares_of_the_rows_add_up() -> None:
    x_XND = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    parts = angle_sums(x_XND[:, :2]) + angle_sums(x_XND[:, 2:])
    torch.testing.assert_close(parts, angle_sums(x_XND), rtol=1e-14, atol=0)
    none = Task(
        3, 1, lambda: BlocksInMemory(tiny("Llama")), TokenRows.whole(torch.empty(0, 4).long())
    )
    assert final_tokens(none.open(), none).shape[:2] == (4, 0), "a process may have no rows"
