"""A mixture of experts pruned on two processes: the files of one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from jobs.benchmarks.support.families import random_family
from sparsify.calibration import stacks
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.methods import get_method
from sparsify.params import QuantParams
from sparsify.pattern import Pattern
from sparsify.pruning.one_pass import OnePass
from sparsify.pruning.prune import PruneResult, prune_checkpoint
from tests.families import FEW_STEPS, token_rows
from tests.integration.recoveries import warm_context

METHODS = ("twofour", "sparsegpt")


def prune_to(dense: Path, out: Path, comm: Comm, method: str) -> PruneResult:
    """SparseGPT's experts are solved together, as they are on a GPU, and quantised in one walk."""
    one_pass = OnePass(QuantParams()) if method == "sparsegpt" else None
    torch.set_num_threads(1)
    with patch.object(stacks, "_ALONE", () if method == "sparsegpt" else stacks._ALONE):
        return prune_checkpoint(
            dense, out, token_rows(8), get_method(method), Pattern.parse("2:4"), FEW_STEPS,
            comm=comm, memory=Memory(2), one_pass=one_pass,
        )  # fmt: skip


def worker(rank: int, world_size: int, dense: str, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    for method in METHODS:
        out = Path(folder) / f"two-{method}"
        prune_to(Path(dense), out, Comm.distributed(is_fixed=True), method)
    dist.destroy_process_group()


def digests(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*.safetensors")}


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
    results = [
        prune_to(tmp_path / "dense", tmp_path / f"one-{method}", Comm.single(True), method)
        for method in METHODS
    ]
    for process in started:
        process.join(300)
        assert process.exitcode == 0
    for method, result in zip(METHODS, results, strict=True):
        one, two = (digests(tmp_path / f"{count}-{method}") for count in ("one", "two"))
        assert one == two != {}, method
        assert ("fragment-00001.safetensors" in one) == (method == "sparsegpt")
        lent = {report.name for report in result.layers if report.num_tokens == 0}
        assert len(lent) == 2 * 3
