"""What a walk keeps to save work: how often models and blocks run, and that no bit tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.calibration.hidden_states import HiddenStateStore, Memory, Placement
from sparsify.calibration.layers import InputOrder
from sparsify.calibration.room import Room, forward_bytes
from sparsify.comm import Comm
from sparsify.methods import get_method
from sparsify.models.blocks import BlocksInMemory
from sparsify.models.calls import BlockArguments, BlockCalls, BlockInputs
from sparsify.models.structure import find_blocks, linears_of
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, _Run
from tests.families import FEW_STEPS, in_two_documents, tiny, token_rows

NUM_ROWS, BATCH = 6, 2
ROWS = in_two_documents(token_rows(NUM_ROWS))
WALKS = [
    ("sparsegpt", "layer"), ("sparsegpt", "block"), ("sparsegpt", "dense"), ("twofour", "layer"),
    ("twofour", "block"),
]  # fmt: skip


class Walked:
    """A model pruned with some room, and how often a whole batch passed what of it."""

    def __init__(
        self, method: str, order: InputOrder, spare_bytes: float | None,
        place: Placement = "device", family: str = "Llama",
    ) -> None:  # fmt: skip
        self.preambles = self.forwards = 0
        model = tiny(family)
        embedding = model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda _, args: self._count("preambles", args[0]))
        first = next(iter(linears_of(find_blocks(model)[1][1]).values()))
        first.register_forward_pre_hook(lambda _, args: self._count("forwards", args[0]))
        source = BlocksInMemory(model)
        run = _Run(
            source, get_method(method), Pattern.parse("2:4"), FEW_STEPS, Comm.single(),
            LayerChoice(order=order), None,
        )  # fmt: skip
        self.layers: list[Any] = []
        store = HiddenStateStore(place, "cpu", None)
        run.walk(
            ROWS, Memory(BATCH, spare_bytes=spare_bytes),
            lambda *_: self.layers.extend(run.take_block()[1]), store,
        )  # fmt: skip
        self.weights = model.state_dict()

    def _count(self, what: str, value: Tensor) -> None:
        if value.shape[:2] == (BATCH, ROWS.ids_NT.shape[1]):  # not one of the small probes
            setattr(self, what, getattr(self, what) + 1)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize(("method", "order"), WALKS)
def test_what_comes_before_the_blocks_is_computed_once_a_batch(
    method: str, order: InputOrder, family: str
) -> None:
    """Whatever the number of blocks, streams and groups, also where blocks are of two kinds."""
    num_batches = NUM_ROWS // BATCH
    assert Walked(method, order, None, family=family).preambles == num_batches
    assert Walked(method, order, 0.0, family=family).preambles > 3 * num_batches


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize(
    ("method", "order", "streams", "passes"),
    [
        ("sparsegpt", "layer", 1, 1), ("sparsegpt", "block", 1, 2), ("sparsegpt", "dense", 1, 1),
        ("twofour", "layer", 2, 2), ("twofour", "block", 2, 3),
    ],
)  # fmt: skip
def test_forwards_of_a_block(
    method: str, order: InputOrder, streams: int, passes: int, place: Placement
) -> None:
    """One for each model in the orders layer and dense, wherever hidden states wait; in the order
    block two of the pruned one."""
    assert passes <= streams * (2 if order == "block" else 1)
    walked = Walked(method, order, 10.0**9, place)
    assert walked.forwards == passes * NUM_ROWS // BATCH


def sizes() -> tuple[int, int, int]:
    """Bytes: what blocks are given for one row, and for a batch, and the batch's paused forward."""
    model = tiny("Llama")
    blocks = find_blocks(model)[1]
    calls = BlockCalls(model, blocks)
    with torch.no_grad():
        calls.learn(blocks[0], ROWS[:1])
        hidden_BTD, given = calls.all(ROWS[:BATCH])
        _, of_one_row = calls.all(ROWS[:1])
    store = HiddenStateStore("device", "cpu", None)
    assert given.num_bytes == 2 * of_one_row.num_bytes == 2 * (16 * 16 + 2 * 16 * 8 * 4)
    return of_one_row.num_bytes, given.num_bytes, forward_bytes(hidden_BTD, 48, 1, store)


@pytest.mark.parametrize(("num_given", "num_held"), [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)])
def test_as_many_batches_as_fit(num_given: int, num_held: int) -> None:
    """The others: a preamble for each of four groups of three blocks, and to the ends of two, and
    a forward begun for every group and to the end."""
    one_row, given, held = sizes()
    walked = Walked("sparsegpt", "layer", one_row + num_given * given + num_held * held)
    assert walked.preambles - 3 == (3 - num_given) * (4 * 3 + 2)
    assert walked.forwards == num_held * 1 + (3 - num_held) * 5


@pytest.mark.parametrize("method", ["sparsegpt", "twofour"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_no_bit_depends_on_the_room(family: str, method: str) -> None:
    _, given, held = sizes()
    rooms: list[tuple[float | None, Placement]] = [
        (None, "device"), (0.0, "device"), (3.5 * given + 1.5 * held, "host"), (None, "host"),
    ]  # fmt: skip
    first, *others = (Walked(method, "layer", spare, place, family) for spare, place in rooms)
    assert len({walked.forwards for walked in (first, *others)}) > 1
    for other in others:
        assert other.layers == first.layers
        assert all(torch.equal(first.weights[name], other.weights[name]) for name in first.weights)


def test_room_is_given_away_once() -> None:
    store = HiddenStateStore("device", "cpu", None)
    room = Room(Memory(1, spare_bytes=10), store)
    assert [room.take(size) for size in (6, 5, 4, 1)] == [True, False, True, False]
    assert Room(Memory(1), store).take(10**18)
    assert not Room(Memory(1), HiddenStateStore("host", "cpu", None)).take(1)


@torch.no_grad()
def test_blocks_of_one_kind_hold_one_mask() -> None:
    """Gemma2's first and third block slide; a view of what another holds takes nothing."""
    model = tiny("Gemma2")
    blocks = find_blocks(model)[1]
    calls = BlockCalls(model, blocks)
    calls.learn(blocks[0], ROWS[:1])
    hidden_BTD, given = calls.all(ROWS)
    masks = [given.call(at, hidden_BTD).kwargs["attention_mask"] for at in range(3)]
    assert masks[0] is masks[2] and not torch.equal(masks[0], masks[1])
    angles = given.call(0, hidden_BTD).kwargs["position_embeddings"]
    seen = {part.data_ptr(): part.nbytes for part in (*masks, *angles)}
    assert given.num_bytes == sum(seen.values()), "and the rows are there anyway"


@pytest.mark.parametrize(
    ("value", "is_constant"),
    [
        (torch.ones(2), True), ((1, (None, "a")), True), ([1], False), ({}, False),
        ((1, [2]), False), (nn.Identity(), False),
    ],
)  # fmt: skip
def test_what_may_remember_a_call_is_not_used_twice(value: Any, is_constant: bool) -> None:
    """As a dict in which blocks leave keys for later ones, in Gemma 4."""
    for args, kwargs in (((value,), {}), ((), {"shared": value})):
        call = BlockInputs(torch.ones(1, 2, 3), args, kwargs)
        assert BlockArguments([call], ROWS).is_constant is is_constant
