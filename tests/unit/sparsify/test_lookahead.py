"""What is done ahead while layers are solved: that it is, and that no bit depends on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.calibration.hidden_states import HiddenStateStore, Memory
from sparsify.calibration.layers import InputOrder, Layer, SolverNeeds
from sparsify.calibration.lookahead import Lookahead
from sparsify.calibration.moments import InputMoments
from sparsify.calibration.walk import walk_blocks
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError, NonFiniteError, SingularHessianError
from sparsify.kernels.precision import float32_products
from sparsify.methods import get_method
from sparsify.models.blocks import BlocksInMemory
from sparsify.models.calls import BlockCalls, run_block
from sparsify.models.structure import find_blocks
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, prune_model
from tests.families import FEW_STEPS, in_two_documents, tiny, token_rows

NUM_ROWS = 6
PATIENCE_S = 30.0
CPU = torch.device("cpu")


def nothing_runs() -> bool:
    names = [thread.name for thread in threading.enumerate()]
    return not any(name.startswith("ahead") or name == "held forward" for name in names)


def test_work_goes_on_beside_the_caller_and_its_failure_waits_for_him() -> None:
    gate = threading.Event()

    def fail() -> Tensor:
        assert not torch.is_grad_enabled()
        raise KeyError("late")

    with Lookahead(CPU, "test") as ahead:
        first = ahead.start(lambda: gate.wait(PATIENCE_S), lambda _: ())
        second = ahead.start(fail, lambda value: [value])
        gate.set()  # the caller's turn comes while the work waits
        assert first() is True
        with pytest.raises(KeyError, match="late"):
            second()
    assert nothing_runs()


def test_leaving_waits_for_what_was_begun() -> None:
    begun, done = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        done.wait(0.05)
        done.set()

    with Lookahead(CPU, "test") as ahead:
        ahead.start(work, lambda _: ())
        begun.wait(PATIENCE_S)
    assert done.is_set()


def test_on_a_gpu_each_stream_waits_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is asked of the two streams, by stand-ins that write it down."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> str:
            log.append(f"event on {self.name}")
            return self.name

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    class Result:
        is_cuda = True

        def record_stream(self, stream: Stream) -> None:
            log.append(f"kept for {stream.name}")

    class On:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            log.append(f"on {self.stream.name}")

        def __exit__(self, *_: object) -> None:
            log.append("off")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: log.append(f"thread on {device}"))

    def work() -> Any:
        log.append("work")
        return Result()

    with Lookahead(torch.device("cuda"), "test of streams") as ahead:
        take = ahead.start(work, lambda result: [result])
        assert log[0] == "event on main", "before anything else is asked of it"
        assert isinstance(take(), Result)
    assert log[1:] == [
        "thread on cuda", "on side", "side waits for main", "work", "event on side", "off",
        "main waits for side", "kept for main",
    ]  # fmt: skip


def prune(family: str, overlap: bool, method: str, order: InputOrder, **options: Any) -> Any:
    model = tiny(family)  # of three blocks: one to be passed ahead before and after the middle one
    rows = options.pop("rows", token_rows(NUM_ROWS))
    result = prune_model(
        model, rows, get_method(method), Pattern.parse("2:4"), FEW_STEPS,
        comm=Comm.single(), memory=Memory(2, overlap=overlap),
        layers=LayerChoice(order=order, **options),
    )  # fmt: skip
    return model.state_dict(), result.layers


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "order"),
    [("twofour", "layer"), ("twofour", "block"), ("sparsegpt", "block"), ("sparsegpt", "dense")],
)
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi", "OPT"])
@pytest.mark.parametrize("skip", [(), ("*.1.*",)])
def test_the_same_bits_with_and_without(
    family: str, method: str, order: InputOrder, skip: tuple[str, ...]
) -> None:
    rows = token_rows(NUM_ROWS)
    if family != "OPT":
        rows = in_two_documents(rows)
    weights = torch.rand(4, *rows.ids_NT.shape, generator=torch.Generator().manual_seed(3))
    options = {"rows": rows, "skip": skip, "token_weights": weights}
    (one, first), (other, second) = (
        prune(family, overlap, method, order, **options) for overlap in (False, True)
    )
    assert first == second
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert nothing_runs()


def watched(model: nn.Module, at: int) -> threading.Event:
    """Set when a thread other than this one comes to block `at`."""
    came, here = threading.Event(), threading.get_ident()

    def note(*_: Any) -> None:
        if threading.get_ident() != here:
            came.set()

    find_blocks(model)[1][at].register_forward_pre_hook(note)
    return came


def walk(model: nn.Module, rows: TokenRows, solve: Callable[[Layer], None], **options: Any) -> None:
    walk_blocks(
        BlocksInMemory(model), rows, solve, comm=Comm.single(), memory=Memory(2, overlap=True),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "needs", [SolverNeeds(teacher=True, order="layer"), SolverNeeds(order="dense")]
)
def test_the_dense_model_passes_the_next_block_while_layers_are_solved(needs: SolverNeeds) -> None:
    model = tiny("Llama")
    came = watched(model, 1)

    def solve(layer: Layer) -> None:
        if layer.block == 0:
            assert came.wait(PATIENCE_S), "nobody passed block 1 while block 0 was solved"

    walk(model, token_rows(NUM_ROWS), solve, needs=needs)
    assert nothing_runs()


def test_hessians_are_factored_while_the_first_layer_is_solved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, here, factored = InputMoments.factor, threading.get_ident(), threading.Event()

    def factor(self: InputMoments, damping: float, name: str) -> Any:
        if "down_proj" in name:
            assert threading.get_ident() != here
            factored.set()
        return original(self, damping, name)

    monkeypatch.setattr(InputMoments, "factor", factor)

    def solve(layer: Layer) -> None:
        assert layer.moments.known_factor(0.01) is not None
        assert factored.wait(PATIENCE_S), "the last layer's factor waits for the first's solution"

    needs = SolverNeeds(factor_damping=0.01, order="block")
    walk(tiny("Llama"), token_rows(NUM_ROWS), solve, needs=needs)


def test_failures_of_what_is_done_ahead_are_told() -> None:
    model, rows = tiny("Llama"), token_rows(NUM_ROWS)
    solved: list[str] = []
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="block 2, layer"):
        walk(model, rows, lambda layer: solved.append(layer.name), needs=SolverNeeds(order="dense"))
    assert {name.split(".")[2] for name in solved} == {"0", "1"}
    one_token = TokenRows.whole(torch.full((1, 1), 5))
    with pytest.raises(SingularHessianError, match=r"q_proj: the Hessian is singular"):
        walk(tiny("Llama"), one_token, solved.append, needs=SolverNeeds(factor_damping=0.0))
    assert nothing_runs()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_hessian_that_cannot_be_factored_is_known_before_a_layer_is_solved(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ahead, it is known when the layer's turn comes."""
    original, solved = InputMoments.factor, []

    def factor(self: InputMoments, damping: float, name: str) -> Any:
        if "down_proj" in name:
            raise SingularHessianError(name)
        return original(self, damping, name)

    monkeypatch.setattr(InputMoments, "factor", factor)
    with pytest.raises(SingularHessianError, match="down_proj"):
        walk_blocks(
            BlocksInMemory(tiny("Llama")), token_rows(NUM_ROWS), solved.append, comm=Comm.single(),
            memory=Memory(2, overlap=overlap), needs=SolverNeeds(factor_damping=0.01),
        )  # fmt: skip
    assert len(solved) == (6 if overlap else 0)


def test_the_solvers_failure_ends_what_is_done_ahead() -> None:
    def solve(_: Layer) -> None:
        raise KeyError("solver")

    with pytest.raises(KeyError, match="solver"):
        walk(
            tiny("Llama"),
            token_rows(NUM_ROWS),
            solve,
            needs=SolverNeeds(teacher=True, order="layer"),
        )
    assert nothing_runs()


def test_hidden_states_that_do_not_stay_on_the_device_are_refused() -> None:
    store = HiddenStateStore("host", "cpu", None)
    needs = SolverNeeds(teacher=True, order="layer")
    with pytest.raises(InputError, match=r"prune.overlap=true: .* use prune.overlap=false"):
        walk(tiny("Llama"), token_rows(NUM_ROWS), lambda _: None, needs=needs, store=store)
    walk(tiny("Llama"), token_rows(NUM_ROWS), lambda _: None, needs=SolverNeeds(), store=store)


@torch.no_grad()
def test_blocks_run_in_another_thread_while_calls_are_made() -> None:
    model, rows = tiny("Llama"), token_rows(2)
    blocks = find_blocks(model)[1]
    calls = BlockCalls(model, blocks)
    calls.learn(blocks[0], rows)
    inputs = calls.first(rows)
    expected, found = run_block(blocks[1], inputs), []

    def beside(*_: Any) -> None:
        thread = threading.Thread(
            target=torch.no_grad()(lambda: found.append(run_block(blocks[1], inputs)))
        )
        thread.start()
        thread.join()

    handle = model.get_input_embeddings().register_forward_hook(beside)
    call = calls.call(2, rows, expected)
    handle.remove()
    assert call.hidden_BTD is expected
    assert torch.equal(found[0], expected)


def test_precision_lasts_until_the_last_thread_leaves() -> None:
    cuda = torch.backends.cuda.matmul
    before = cuda.fp32_precision
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with float32_products():
            inside.set()
            leave.wait(PATIENCE_S)

    thread = threading.Thread(target=other)
    with float32_products(allow_tf32=True):
        assert cuda.fp32_precision == "tf32"
        thread.start()
        inside.wait(PATIENCE_S)
        assert cuda.fp32_precision == "ieee", "one of two needs it in full"
    assert cuda.fp32_precision == "ieee"
    leave.set()
    thread.join()
    assert cuda.fp32_precision == before
