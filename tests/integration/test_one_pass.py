"""Pruned and quantised in one walk: by the commands, and on two processes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.formats.source import open_source
from sparsify.methods import PruneParams, get_method
from sparsify.packed.folder import PackedFolder
from sparsify.params import QuantParams
from sparsify.pattern import Pattern
from sparsify.pruning.one_pass import FOLDER, OnePass
from sparsify.pruning.prune import prune_checkpoint
from tests.integration.recoveries import exit_codes


def prune_to(dense: Path, out: Path, comm: Comm) -> None:
    torch.set_num_threads(1)
    ids = torch.randint(0, 320, (8, 32), generator=torch.Generator().manual_seed(1))
    prune_checkpoint(
        dense, out, TokenRows.whole(ids), get_method("sparsegpt"), Pattern.parse("2:4"),
        PruneParams(), comm=comm, memory=Memory(2), one_pass=OnePass(QuantParams(group_size=32)),
    )  # fmt: skip


def worker(rank: int, dense: str, folder: str) -> None:
    prune_to(Path(dense), Path(folder) / "two", Comm.distributed(is_fixed=True))


def digests(out: Path) -> dict[str, str]:
    paths = [*out.glob("m*.safetensors"), *(out / FOLDER).iterdir()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_fixed_order_writes_the_same_files_on_two_processes(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert exit_codes(2, worker, str(tiny_model_dir), str(tmp_path)) == [0, 0]
    prune_to(tiny_model_dir, tmp_path / "one", Comm.single(is_fixed=True))
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert any(name.startswith("fragment") for name in digests(tmp_path / "one"))


def test_the_stages_leave_one_model_in_two_forms(run_job, small, tmp_path: Path) -> None:
    """What is pruned, scored and exported as dense has the values of the packed codes."""
    run = tmp_path / "run"
    words = [*small, f"run.dir={run}", "quantize.one_pass=true", "prune.baselines=[]"]
    refused = run_job("prune", *words)
    assert refused.returncode == 2
    assert "leave distill out of stages" in refused.stderr.splitlines()[-1]
    refused = run_job("prune", *words, "stages=[prune]", "prune.pattern=unstructured:0.5")
    assert refused.returncode == 2
    assert "takes a pattern N:M" in refused.stderr.splitlines()[-1]
    refused = run_job("prune", *words, "stages=[prune]", "quantize.scheme=nf4",
                      "quantize.symmetric=false")  # fmt: skip
    assert refused.returncode == 2
    done = run_job(
        "prune", *words, "stages=[prune,evaluate,quantize,export]", "quantize.reduction=fixed"
    )
    assert done.returncode == 0, done.stderr
    assert "quantize.num_samples=8, quantize.reduction=fixed has no effect" in done.stderr
    packed = PackedFolder(run / "quantize" / "packed")
    pruned = open_source(run / "prune" / "twofour", "float32")
    for name in packed.shapes():
        assert torch.equal(packed.dense(name, torch.float32), pruned.tensor(name)), name
    quantized = json.loads((run / "quantize" / "record.json").read_text())["metrics"]
    assert list(quantized["results"]) == ["one_pass_int4"]
    scored = json.loads((run / "evaluate" / "record.json").read_text())["metrics"]["results"]
    assert quantized["results"]["one_pass_int4"]["perplexity"] == scored["twofour"]["perplexity"]
    layers = quantized["quantization"]["layers"]
    assert len(layers) == len(packed.contents.layers)
    assert all(0 < layer["relative_error"] < 1 for layer in layers)
    # A pruning without it is not taken for one.
    plain = [
        *small,
        f"run.dir={tmp_path / 'plain'}",
        "prune.baselines=[]",
        "prune.method=magnitude",
    ]
    assert run_job("prune", *plain, "stages=[prune]").returncode == 0
    again = [*plain, f"run.from={tmp_path / 'plain'}", "stages=[quantize]"]
    refused = run_job("prune", *again, "quantize.one_pass=true")
    assert refused.returncode == 2
    assert "was not quantised while it was pruned" in refused.stderr.splitlines()[-1]
