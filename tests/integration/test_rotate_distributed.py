"""Several real gloo processes look for rotations as one does, and stop together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import NonFiniteError, SingularHessianError
from sparsify.pattern import Pattern
from sparsify.rotation import search as rotation_search
from sparsify.rotation.rotate import RotationReport, rotate_model
from tests.integration.recoveries import warm_context

WORLD_SIZES = (2, 4)
STEPS = 15


def rotate(comm: Comm, *, broken: bool = False) -> tuple[LlamaForCausalLM, RotationReport]:
    """A model of three blocks rotated by 11 rows; `broken`: one weight of it is NaN."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=52, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.randint(0, 64, (11, 24))
    if broken:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    report = rotate_model(
        model, TokenRows.whole(ids), steps=STEPS, seed=0, batch_size=2,
        pattern=Pattern.parse("2:4"), comm=comm,
    )  # fmt: skip
    return model, report


def error_of(comm: Comm, **options: Any) -> str:
    try:
        rotate(comm, **options)
    except (NonFiniteError, SingularHessianError) as error:
        return str(error)
    return "no error"


def worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous{world_size}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    found: dict[str, Any] = {}
    for name, is_fixed in (("fast", False), ("fixed", True)):
        model, report = rotate(Comm.distributed(is_fixed))
        found[name] = (model.state_dict(), report)
    comm = Comm.distributed()
    found["broken"] = error_of(comm, broken=rank == world_size - 1)
    sum_lanes, calls = rotation_search.sum_lanes, []

    def fail_on_the_last(*args: Any) -> torch.Tensor:
        calls.append(None)
        if rank == world_size - 1 and len(calls) == 3:
            raise SingularHessianError("out of luck in step 3")
        return sum_lanes(*args)

    rotation_search.sum_lanes = fail_on_the_last
    found["failed"] = error_of(comm)
    torch.save(found, f"{folder}/rank{rank}-of-{world_size}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every process of a group of 2, and of a group of 4, found."""
    folder = tmp_path_factory.mktemp("gloo")
    warm_context()
    for world_size in WORLD_SIZES:
        mp.start_processes(
            worker, args=(world_size, str(folder)), nprocs=world_size, start_method="forkserver"
        )
    return {
        world_size: [
            torch.load(folder / f"rank{rank}-of-{world_size}.pt", weights_only=False)
            for rank in range(world_size)
        ]
        for world_size in WORLD_SIZES
    }


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_many_processes_find_the_rotation_of_one(ranks, world_size: int) -> None:
    _, single = rotate(Comm.single())
    state, report = ranks[world_size][0]["fast"]
    for found in ranks[world_size][1:]:
        other_state, other = found["fast"]
        assert torch.equal(report.rotation.residual_DD, other.rotation.residual_DD)
        assert all(torch.equal(state[name], other_state[name]) for name in state)
        assert report.pruned_share_after == other.pruned_share_after
    matrices = [report.rotation.residual_DD, *report.rotation.values]
    for mine, one in zip(
        matrices, [single.rotation.residual_DD, *single.rotation.values], strict=True
    ):
        # One process that adds up in eight lanes differs by 4e-7.
        torch.testing.assert_close(mine, one, rtol=0, atol=1e-4)
        assert (one - torch.eye(one.shape[-1])).abs().max() > 0.1, "nothing was rotated"
    assert report.pruned_share_before == pytest.approx(single.pruned_share_before, rel=1e-5)
    assert report.pruned_share_after == pytest.approx(single.pruned_share_after, rel=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_fixed_order_gives_the_same_bits(ranks, world_size: int) -> None:
    model, single = rotate(Comm.single(is_fixed=True))
    for found in ranks[world_size]:
        state, report = found["fixed"]
        assert torch.equal(report.rotation.residual_DD, single.rotation.residual_DD)
        assert all(map(torch.equal, report.rotation.values, single.rotation.values))
        assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
        figures = (report.entropy_after, report.pruned_share_after)
        assert figures == (single.entropy_after, single.pruned_share_after)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_what_stops_one_process_stops_all(ranks, world_size: int) -> None:
    broken = {found["broken"] for found in ranks[world_size]}
    assert len(broken) == 1 and "inputs hold NaN or infinity" in broken.pop()
    assert {found["failed"] for found in ranks[world_size]} == {"out of luck in step 3"}
