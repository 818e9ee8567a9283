"""What needs an interpreter of its own: memory at its peak, packages that are not there, Triton's
interpreter. Each would be a unit test if it did not import torch again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from jobs.benchmarks import loss, plan
from sparsify.errors import TwofourError
from tests.conftest import REPOSITORY
from tests.numerics.test_kernels import needs_triton
from tests.unit.jobs.benchmarks.test_bench_loss import SIZE
from tests.unit.jobs.benchmarks.test_bench_step import TINY

NUM_TOKENS = 2000
# Tests in the interpreter.
KERNELS = {"test_kernels": 14, "test_gptq_kernel": 21, "test_search_kernel": 13}


def test_memory_of_full_logits_is_seen_and_the_head_takes_less():
    """80 MB of logits per tensor: full logits hold several, the head a tenth of one."""
    size = SIZE | {"tokens": NUM_TOKENS, "vocabulary": 10_000, "chunk": 50}
    head, naive = (loss.peak_bytes(size | {"side": side}) for side in ("head", "naive"))
    logits = 4 * NUM_TOKENS * 10_000
    assert naive > 3 * logits
    assert 0 < head < logits / 2
    with pytest.raises(TwofourError, match="exit code 1: KeyError: 'other'"):
        loss.peak_bytes(SIZE | {"side": "other"})


def test_a_machine_without_ray_and_deepspeed_needs_the_plain_engine(tmp_path):
    """Such a machine, as the import system shows it; nothing replaces DeepSpeed unasked."""
    code = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"ray", "deepspeed", "hydra", "omegaconf", "wandb", "datasets"}}:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from jobs import bench
words = {TINY!r} + ["--workdir", {str(tmp_path)!r}]
print(bench.main([*words, "--engine", "plain", "--out", {str(tmp_path / "out.json")!r}]))
print(bench.main(words))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "0" in lines
    assert lines[-1] == "2"
    assert "error: --engine deepspeed: DeepSpeed is not installed here" in done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["settings"]["engine"] == "plain"
    assert record["settings"]["zero_stage"] is None


def test_a_planned_recovery_is_measured_step_by_step(tmp_path):
    sizes = {"shape": "tiny", "layers": 2, "vocabulary": 1024, "sequence_length": 32}
    one = plan._recovery(sizes, 1, zero_stage=0)
    (figures,) = plan._measure(one, tmp_path, is_timed=False)
    assert len(figures["step_peak_bytes"]) == len(figures["step_cpu_s"]) == one["steps"]
    assert "rates" not in figures
    timed = plan._measure(one, tmp_path, is_timed=True)
    before, after = timed[0]["rates"]
    assert before["products"] > 0 and plan._rates_of(timed).products == pytest.approx(
        (before["products"] + after["products"]) / 2
    )


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_in_the_interpreter(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         str(REPOSITORY / f"tests/numerics/{name}.py"), "-k", "TestInterpreted"],
        cwd=REPOSITORY, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    is_complete = f"{KERNELS[name]} passed" in done.stdout
    assert done.returncode == 0 and is_complete, done.stdout + done.stderr
