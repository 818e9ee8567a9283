"""One Ray for each process that runs tests, and the commands as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.commands import Command

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a Ray that lives as long as the tests; commands join it by RAY_ADDRESS."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_metrics_report_interval_ms"] = "2000"  # noqa: SIM112  10 s otherwise
    # As where a virtual environment is active: jobs of this Ray are started as `python`.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    import ray

    options = {"num_cpus": 2, "include_dashboard": True, "log_to_driver": False}
    try:
        ray.init(address="local", **options)
    except Exception:  # Ray gives its processes 30 s, which a machine with other work may exceed
        ray.shutdown()
        ray.init(address="local", **options)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of many documents: this repository's sources."""
    path = tmp_path_factory.mktemp("text") / "sources.txt"
    sources = sorted((REPOSITORY / "sparsify").rglob("*.py"))
    sources += sorted((REPOSITORY / "jobs").rglob("*.py"))
    texts = [source.read_text(encoding="utf-8") for source in sources]
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def base(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a recovery starts from, in the folders student, teacher and rows."""
    from tests.integration.recoveries import make_base

    folder = tmp_path_factory.mktemp("base")
    make_base(folder, tiny_model_dir)
    return folder


Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def environment(ray_address: str) -> dict[str, str]:
    """Environment of a command that joins the session's Ray."""
    return {
        **os.environ,
        "RAY_ADDRESS": ray_address,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


@pytest.fixture(scope="session")
def run_job(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run `python -m jobs.<job> overrides...` in an empty folder; returns the finished process."""
    folder = tmp_path_factory.mktemp("work")

    def run(job: str, *overrides: str) -> subprocess.CompletedProcess:
        return Command(job, *overrides, environment=environment, folder=folder).finished(900)

    return run


@pytest.fixture(scope="session")
def small(tiny_model_dir: Path, text_file: Path) -> list[str]:
    """Overrides that make the whole pipeline small: a tiny model, few rows, few steps.

    Workers are plain processes, which start in a tenth of Ray's time; tests of what Ray does say
    cluster.executor=ray after these.
    """
    return [
        f"model.path={tiny_model_dir}",
        f"data.calibration={text_file}",
        "data.sequence_length=64",
        "prune.num_samples=8",
        "distill.num_tokens=8192",
        "distill.batch_size=8",
        "distill.micro_batch_size=4",
        "distill.checkpoint_every_steps=4",
        "evaluate.num_tokens=1024",
        "quantize.num_samples=8",
        "quantize.group_size=32",
        "export.max_timed_gb=0",
        "tracker.wandb=off",
        "cluster.executor=plain",
    ]
