"""A Hessian that several real gloo processes factor together: figures, bits and failures."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from sparsify import comm as dealing
from sparsify.calibration import cholesky
from sparsify.calibration.factors import assign_factors
from sparsify.calibration.hessian import InverseFactor, inverse_factor
from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.lookahead import Lookahead
from sparsify.calibration.moments import InputMoments
from sparsify.comm import Comm
from sparsify.errors import NonFiniteError, SingularHessianError
from sparsify.methods import PruneParams, get_method
from sparsify.pruning.prune import prune_model
from tests.integration.recoveries import run
from tests.integration.test_prune_distributed import PATTERN, model_and_rows
from tests.numerics.test_hessian import moment, tokens

WIDTHS = {"q_proj": 40, "o_proj": 40, "down_proj": 203}
WORLDS = (2, 3, 4)
DAMPING = 0.01
CASES = {"singular": 0.0, "grows": DAMPING, "nan": DAMPING}


def small() -> Any:
    """Sizes at which tests are quick: the widest is shared, in five panels."""
    least = patch.object(dealing, "_LEAST_SHARED", 64)
    panel = patch.object(cholesky, "_PANEL", 48)
    least.start()
    panel.start()
    return [least, panel]


def hessian_of(name: str, case: str = "") -> Tensor:
    width = WIDTHS[name]
    hessian_II = moment(tokens(100 if case == "singular" else 600, width)).float()
    if case == "grows" and name == "down_proj":
        hessian_II = torch.eye(width)
        hessian_II[150, 160] = hessian_II[160, 150] = 1.05
    if case == "nan" and name == "down_proj":
        hessian_II[5, 7] = hessian_II[7, 5] = torch.nan
    return hessian_II


ONE_BY_ONE = [[name] for name in WIDTHS]
STACKED = [["q_proj", "o_proj"], ["down_proj"]]


def factors_of(
    comm: Comm, ahead: Lookahead | None, damping: float, case: str,
    stacks: list[list[str]] = ONE_BY_ONE,
) -> dict[str, Any]:  # fmt: skip
    """Layer -> its factor as every process has it, or the failure's words."""
    moments = {name: InputMoments(hessian_of(name, case), 600) for name in WIDTHS}
    found: dict[str, Any] = {}
    try:
        assign = assign_factors(moments, stacks, damping, comm, ahead)
        for stack in stacks:
            assign(stack)
            found |= {name: moments[name].known_factor(damping) for name in stack}
    except (NonFiniteError, SingularHessianError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def worker(rank: int, world_size: int, folder: str) -> None:
    small()
    found: dict[str, Any] = {}
    comms = {"fast": Comm.distributed()}
    if world_size != 3:
        comms["fixed"] = Comm.distributed(is_fixed=True)
    for kind, comm in comms.items():
        found[kind] = factors_of(comm, None, DAMPING, "")
        with Lookahead(torch.device("cpu"), "test") as ahead:
            found[f"{kind} ahead"] = factors_of(comm, ahead, DAMPING, "")
            found[f"{kind} stacked"] = factors_of(comm, ahead, DAMPING, "", STACKED)
            for case, damping in CASES.items():
                found[f"{kind} {case}"] = factors_of(comm, ahead, damping, case)
    if world_size != 3:
        found["model"] = pruned(comms["fixed"], overlap=True)
    torch.save(found, f"{folder}/{rank}-of-{world_size}.pt")


def pruned(comm: Comm, overlap: bool = False) -> dict[str, Tensor]:
    model, rows = model_and_rows()
    prune_model(
        model, rows, get_method("sparsegpt"), PATTERN, PruneParams(block_size=32), comm=comm,
        memory=Memory(2, overlap=overlap),
    )  # fmt: skip
    return model.state_dict()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("gloo")
    for world_size in WORLDS:
        run(world_size, worker, world_size, str(folder))
    return {
        world_size: [
            torch.load(folder / f"{rank}-of-{world_size}.pt", weights_only=False)
            for rank in range(world_size)
        ]
        for world_size in WORLDS
    }


@pytest.fixture
def alone() -> Any:
    """A fixed order on one process, with the same sizes."""
    patches = small()
    torch.set_num_threads(1)
    yield Comm.single(is_fixed=True)
    for one in patches:
        one.stop()


def is_same(one: InverseFactor, other: InverseFactor) -> bool:
    figures = [(f.damping, f.num_attempts, f.condition) for f in (one, other)]
    return (
        torch.equal(one.upper_II, other.upper_II)
        and torch.equal(one.dead_columns, other.dead_columns)
        and figures[0] == figures[1]
    )


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_process_has_the_factor_of_one(ranks, world_size: int) -> None:
    first = ranks[world_size][0]
    for name in WIDTHS:
        factor, hessian_II = first["fast"][name], hessian_of(name)
        exact = inverse_factor(hessian_II.double(), DAMPING, name)
        error = float((factor.upper_II.double() - exact.upper_II).norm() / exact.upper_II.norm())
        assert error < 5e-6, name  # condition of about 700 in float32
        assert factor.condition == pytest.approx(exact.condition, rel=1e-3)
        assert (factor.damping, factor.num_attempts) == (DAMPING, 1)
        assert torch.equal(factor.upper_II, factor.upper_II.triu())
        for found in ranks[world_size]:
            assert is_same(found["fast"][name], factor), name
            assert is_same(found["fast ahead"][name], factor), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_fixed_order_makes_the_same_bits_for_every_number(ranks, world_size: int, alone) -> None:
    expected = factors_of(alone, None, DAMPING, "")
    for found in ranks[world_size]:
        for name in WIDTHS:
            assert is_same(found["fixed"][name], expected[name]), name
            assert is_same(found["fixed ahead"][name], expected[name]), name


@pytest.mark.parametrize("world_size", WORLDS)
def test_stacks_are_of_one_process_and_have_the_same_bits(ranks, world_size: int, alone) -> None:
    expected = factors_of(alone, None, DAMPING, "", STACKED)
    for found in ranks[world_size]:
        for name in WIDTHS if world_size != 3 else STACKED[0]:
            kind = "fixed" if world_size != 3 else "fast"
            assert is_same(found[f"{kind} stacked"][name], expected[name]), name
            upper_II = found[f"{kind} ahead"][name].upper_II
            assert torch.equal(found[f"{kind} stacked"][name].upper_II, upper_II), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_model_is_pruned_to_the_same_bits(ranks, world_size: int, alone) -> None:
    expected = pruned(alone)
    for found in ranks[world_size]:
        assert all(torch.equal(found["model"][name], expected[name]) for name in expected)


@pytest.mark.parametrize("world_size", WORLDS)
def test_failures_are_those_of_one_process_and_stop_all(ranks, world_size: int) -> None:
    for found in ranks[world_size]:
        for kind in ("fast", "fixed") if world_size != 3 else ("fast",):
            grown = found[f"{kind} grows"]["down_proj"]
            assert (grown.damping, grown.num_attempts) == (0.1, 2)
            assert set(found[f"{kind} singular"]) == {"q_proj", "o_proj", "error"}
            for case, damping in (("singular", 0.0), ("nan", DAMPING)):
                with pytest.raises((SingularHessianError, NonFiniteError)) as failure:
                    inverse_factor(hessian_of("down_proj", case), damping, "down_proj")
                words = f"{failure.type.__name__}: {failure.value}"
                assert found[f"{kind} {case}"]["error"] == words
