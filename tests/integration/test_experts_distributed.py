"""A mixture of experts pruned on two processes: the files of one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.benchmarks.support.families import random_family
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.methods import get_method
from sparsify.pattern import Pattern
from sparsify.pruning.prune import PruneResult, prune_checkpoint
from tests.families import FEW_STEPS, token_rows
from tests.integration.recoveries import warm_context


def prune_to(dense: Path, out: Path, comm: Comm) -> PruneResult:
    torch.set_num_threads(1)
    return prune_checkpoint(
        dense, out, token_rows(8), get_method("twofour"), Pattern.parse("2:4"), FEW_STEPS,
        comm=comm, memory=Memory(2),
    )  # fmt: skip


def worker(rank: int, world_size: int, dense: str, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    prune_to(Path(dense), Path(folder) / "two", Comm.distributed(is_fixed=True))
    dist.destroy_process_group()


def digests(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("m*.safetensors")}


def test_a_fixed_order_writes_the_same_files_on_two_processes(tmp_path: Path) -> None:
    dense = random_family("deepseek_v3")
    for block in dense.model.layers[1:]:
        block.mlp.gate.e_score_correction_bias[3] = -1e9  # no token goes there
    dense.save_pretrained(tmp_path / "dense")
    processes = warm_context()
    started = [
        processes.Process(target=worker, args=(rank, 2, str(tmp_path / "dense"), str(tmp_path)))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    result = prune_to(tmp_path / "dense", tmp_path / "one", Comm.single(is_fixed=True))
    for process in started:
        process.join(300)
        assert process.exitcode == 0
    assert digests(tmp_path / "two") == digests(tmp_path / "one") != {}
    lent = {report.name for report in result.layers if report.num_tokens == 0}
    assert len(lent) == 2 * 3
