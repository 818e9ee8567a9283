"""Tokenising on Ray: the command as a user runs it, killed in the middle, run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsify.data.rows import TokenRows
from sparsify.data.store import TokenStore
from sparsify.models.load import load_tokenizer
from tests.integration.commands import Command

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STORIES = [f"Story {i}: " + "the cat sat on the mat. " * (i % 7 + 1) for i in range(400)]


@pytest.fixture
def overrides(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    """Two sources, some thirty shards."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    table = pyarrow.table({"text": [story[::-1] for story in STORIES]})
    pyarrow.parquet.write_table(table, tmp_path / "back.parquet", row_group_size=80)
    return [
        f"model.path={tiny_model_dir}",
        f"data.mix=[3 {path},1 {tmp_path / 'back.parquet'}]",
        "data.sequence_length=32",
        "tokenize.shard_bytes=2500",
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_a_killed_run_goes_on_to_the_same_bytes(
    run_job, environment, overrides, tmp_path: Path, tiny_model_dir: Path
) -> None:
    killed = tmp_path / "killed"
    command = ("tokenize", *overrides, f"tokenize.out={killed}")
    process = Command(*command, environment=environment, folder=tmp_path)
    deadline_s = time.monotonic() + 600
    while not list(killed.glob(".tokenize/*.shard.json")) and process.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists()
    done = run_job("tokenize", *overrides, f"tokenize.out={killed}", "cluster.num_workers=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(killed)
    store = TokenStore.open(killed)
    for shard in store.shards:
        store.verify_shard(shard)
    store.check_tokenizer(load_tokenizer(tiny_model_dir), "tiny")
    rows: TokenRows = store.rows(store.order(seed=0).batch(0, 8))
    assert rows.ids_NT.shape == (8, 32)

    # The same work in this process, all at once and undisturbed.
    from conf.options.tokenize import TokenizeJobConfig
    from jobs.cli.compose import load_config
    from jobs.workers.tokenize import write_store
    from tests.unit.jobs.test_tokenize_command import Told, in_process

    config = load_config("tokenize", overrides)
    assert isinstance(config, TokenizeJobConfig)
    (tmp_path / "whole").mkdir()
    write_store(config, tmp_path / "whole", in_process, Told())  # type: ignore[arg-type]
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_bad_record_on_a_worker_is_one_line(run_job, overrides, tmp_path: Path) -> None:
    with (tmp_path / "stories.jsonl").open("a") as file:
        file.write('{"text": 7}\n')
    done = run_job("tokenize", *overrides, f"tokenize.out={tmp_path / 'store'}")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: data source ")
    assert "field 'text' is int, not a string" in last
    assert "Traceback" not in done.stderr


_DYING = """
import os, sys, time
from pathlib import Path
from cluster.errors import WorkFailedError
from cluster.runtime.backend import RayCluster
from cluster.spec import ClusterSpec

def work(context, payload):
    index, folder = payload
    flag = Path(folder) / str(index)
    if index == 2 or (index == 1 and not flag.exists()):
        flag.touch()
        os._exit(9)
    return {"index": index}

def nap(context, payload):
    begun_s = time.time()
    time.sleep(0.2)
    return begun_s, time.time()

told = []
root = Path(sys.argv[2])  # what a Ray that is joined needs to import the work's helpers
with RayCluster(ClusterSpec(num_workers=1, max_failures=1), "dying", root, told.append) as cluster:
    payloads = [(index, sys.argv[1]) for index in range(3)]
    print(">", cluster.run_tasks("some", work, payloads[:2], "shards"))
    print(">", [event["text"] for event in told if event["kind"] == "warning"])
    naps = cluster.run_tasks("naps", nap, range(4), "naps")
    print(">", all(end <= begin for (_, end), (begin, _) in zip(naps, naps[1:])))
    try:
        cluster.run_tasks("some", work, payloads[2:], "shards")
    except WorkFailedError as error:
        print(">", error.kind, error.message)
"""


def test_a_worker_that_dies_is_replaced_but_not_for_ever(environment, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DYING, str(tmp_path), str(REPOSITORY)], env=environment,
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("> ")]
    results, warnings, is_one_at_a_time, failure = (
        lines  # Ray itself has something to say between them
    )
    assert results == "[{'index': 0}, {'index': 1}]"
    assert warnings == "['some: a worker was lost; doing its part again']"
    assert is_one_at_a_time == "True", "one worker, whatever the cores of the cluster"
    assert failure.startswith("WorkerLost some: workers kept dying, 2 times at one of the shards")
