"""Several real gloo processes prune as one does, from memory and from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.calibration.hessian import HessianSum
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError, SingularHessianError
from sparsify.methods import PruneParams, get_method
from sparsify.models.load import load_model
from sparsify.models.save import save_model
from sparsify.pattern import Pattern
from sparsify.pruning.prune import PruneResult, prune_checkpoint, prune_model
from tests.conftest import count_violations
from tests.integration.recoveries import warm_context

PATTERN = Pattern.parse("2:4")
NUM_ROWS = 11  # odd, so that the processes' shares differ
METHODS = ["sparsegpt", "wanda", "twofour"]
WORLD_SIZES = (2, 4)


def model_and_rows() -> tuple[LlamaForCausalLM, TokenRows]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=100, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config), TokenRows.whole(torch.randint(0, 64, (NUM_ROWS, 48)))


def prune(method: str, comm: Comm) -> tuple[LlamaForCausalLM, PruneResult]:
    model, rows = model_and_rows()
    result = prune_model(
        model, rows, get_method(method), PATTERN, PruneParams(block_size=32), comm=comm,
        memory=Memory(2),
    )  # fmt: skip
    return model, result


def prune_from_disk(dense: Path, out: Path, comm: Comm) -> None:
    prune_checkpoint(
        dense, out, model_and_rows()[1], get_method("twofour"), PATTERN, PruneParams(block_size=32),
        comm=comm, memory=Memory(2, overlap=comm.world_size > 1),
    )  # fmt: skip


def worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous{world_size}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    fast, fixed = Comm.distributed(), Comm.distributed(is_fixed=True)
    found: dict[str, Any] = {"gathered": []}
    for num_rows in (0, 1, 5, 6):
        whole = torch.arange(num_rows * 3).reshape(num_rows, 3)
        for dtype in (torch.bfloat16, torch.bool, torch.float32):
            share = whole.to(dtype)[fast.row_slice(num_rows)]
            found["gathered"].append(
                torch.equal(fast.gather_rows(share, num_rows)(), whole.to(dtype))
            )
    for name, comm in (("fast", fast), ("fixed", fixed)):
        total = HessianSum(2, "cpu")
        total.add(torch.full((rank + 1, 2), float(rank + 1)))
        total.reduce(comm)
        found[f"hessian {name}"] = (total.mean(), total.num_tokens)
    for method in METHODS:
        for name, comm in (("fast", fast), ("fixed", fixed)):
            model, result = prune(method, comm)
            found[f"{method} {name}"] = (model.state_dict(), result.keep_masks, result.layers)
    prune_from_disk(Path(folder) / "dense", Path(folder) / f"out{world_size}", fixed)
    found["error"] = singular_on_one_process(fast)
    torch.save(found, f"{folder}/rank{rank}-of-{world_size}.pt")
    dist.destroy_process_group()


def singular_on_one_process(comm: Comm) -> str:
    """Two tokens for 64 columns and no damping: the owner's failure must stop all."""
    model, _ = model_and_rows()
    rows = TokenRows.whole(torch.zeros(comm.world_size, 1, dtype=torch.int64))
    try:
        prune_model(
            model, rows, get_method("sparsegpt"), PATTERN, PruneParams(damping=0.0), comm=comm,
            memory=Memory(1),
        )  # fmt: skip
    except SingularHessianError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every process of a group of 2, and of a group of 4, found."""
    folder = tmp_path_factory.mktemp("gloo")
    save_model(model_and_rows()[0], None, folder / "dense")
    prune_from_disk(folder / "dense", folder / "out1", Comm.single(is_fixed=True))
    warm_context()
    for world_size in WORLD_SIZES:
        mp.start_processes(
            worker, args=(world_size, str(folder)), nprocs=world_size, start_method="forkserver"
        )
    found = {
        world_size: [
            torch.load(folder / f"rank{rank}-of-{world_size}.pt", weights_only=False)
            for rank in range(world_size)
        ]
        for world_size in WORLD_SIZES
    }
    found[2][0]["folder"] = folder
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_collectives_are_exact_for_every_dtype_and_share(ranks, world_size: int) -> None:
    # r + 1 tokens of value r + 1 on process r.
    counts = range(1, world_size + 1)
    expected = sum(n**3 for n in counts) / sum(counts)
    for found in ranks[world_size]:
        assert len(found["gathered"]) == 12 and all(found["gathered"])
        for order in ("fast", "fixed"):
            mean, num_tokens = found[f"hessian {order}"]
            assert num_tokens == sum(counts)
            torch.testing.assert_close(mean, torch.full((2, 2), expected))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_many_processes_prune_as_one(ranks, world_size: int, method: str) -> None:
    _, single = prune(method, Comm.single())
    state, masks, reports = ranks[world_size][0][f"{method} fast"]
    for found in ranks[world_size][1:]:
        other_state, other_masks, other_reports = found[f"{method} fast"]
        assert reports == other_reports
        assert all(torch.equal(state[name], other_state[name]) for name in state)
        assert all(torch.equal(masks[name], other_masks[name]) for name in masks)
    assert list(masks) == list(single.keep_masks)
    same = total = 0
    for name, mask in masks.items():
        weight = state[f"{name}.weight"]
        assert count_violations(weight, PATTERN) == 0
        assert not weight[~mask].any()
        groups = (mask == single.keep_masks[name]).reshape(len(mask), -1, 4).all(-1)
        same, total = same + int(groups.sum()), total + groups.numel()
    # Sums in another order may flip a near-tie; all 22,080 groups agreed when measured. A search
    # of many steps makes more of a flipped tie, and the layers behind it make up for what it did:
    # there 88.8 % agreed on these random weights, and the errors over all layers to 0.4 %.
    is_search = method == "twofour"
    assert same >= (0.8 if is_search else 0.9999) * total
    for many, one in zip(reports, single.layers, strict=True):
        assert many.name == one.name and many.num_tokens == one.num_tokens == NUM_ROWS * 48
        # Measured worst relative difference of sparsegpt and wanda: 3.2e-6.
        assert is_search or math.isclose(many.error, one.error, rel_tol=1e-4)
    found_error, expected = (
        sum(report.relative_error for report in layers) for layers in (reports, single.layers)
    )
    assert math.isclose(found_error, expected, rel_tol=0.02)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_a_fixed_order_gives_the_same_bits(ranks, world_size: int, method: str) -> None:
    model, single = prune(method, Comm.single(is_fixed=True))
    expected = model.state_dict()
    for found in ranks[world_size]:
        state, masks, _ = found[f"{method} fixed"]
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert all(torch.equal(masks[name], single.keep_masks[name]) for name in masks)


def test_a_fixed_order_writes_the_same_files(ranks) -> None:
    folder = ranks[2][0]["folder"]
    names = sorted(path.name for path in (folder / "out1").glob("*.safetensors"))
    assert len(names) == 3 + 3 + 1
    for world_size in WORLD_SIZES:
        for name in names:
            other = folder / f"out{world_size}" / name
            assert other.read_bytes() == (folder / "out1" / name).read_bytes(), name
    assert load_model(folder / "out4") is not None


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_failure_on_one_process_stops_all_with_its_words(ranks, world_size: int) -> None:
    messages = {found["error"] for found in ranks[world_size]}
    assert len(messages) == 1
    assert "the Hessian is singular" in messages.pop()


def test_shares_cover_all_rows_once() -> None:
    for world_size in (1, 2, 3, 4, 8):
        for num_rows in (0, 1, 5, 8, 100):
            shares = [list(range(num_rows))[Comm(rank, world_size).row_slice(num_rows)]
                      for rank in range(world_size)]  # fmt: skip
            assert [row for share in shares for row in share] == list(range(num_rows))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            if Comm.NUM_LANES % world_size:
                continue
            lanes = [lane for rank in range(world_size)
                     for lane in Comm(rank, world_size, is_fixed=True).lanes(num_rows)]  # fmt: skip
            assert lanes == Comm.single(is_fixed=True).lanes(num_rows)
            joined = [row for lane in lanes for row in range(num_rows)[lane]]
            assert joined == list(range(num_rows))


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(InputError, match="not initialised"):
        Comm.distributed()
    with pytest.raises(InputError, match="works with 1, 2, 4 or 8 workers, not 3"):
        Comm(0, 3, is_fixed=True)
    model, rows = model_and_rows()
    with pytest.raises(InputError, match="7 calibration rows for 8 lanes of a fixed order"):
        prune_model(
            model, rows[:7], get_method("wanda"), PATTERN, PruneParams(),
            comm=Comm.single(is_fixed=True), memory=Memory(2),
        )  # fmt: skip
