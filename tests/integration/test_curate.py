"""Curation as a user runs it: killed in the middle, run again on Ray, its output read by others."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from conf.options.curate import CurateConfig, CurateJobConfig
from jobs.workers.curate import DATA, RECORD, write_corpus
from tests.integration.commands import Command
from tests.unit.jobs.test_curate_command import contents
from tests.unit.jobs.test_tokenize_command import Told, in_process

WORDS = [f"word{i}" for i in range(300)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Some forty shards; every tenth document is a copy of the first."""
    path = tmp_path / "stories.jsonl"
    texts = [" ".join(random.Random(i * (i % 10 > 0)).choices(WORDS, k=40)) for i in range(400)]
    path.write_text(
        "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    )
    return path


def test_a_killed_run_goes_on_to_the_same_bytes(
    run_job, environment, corpus: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    killed = tmp_path / "killed"
    words = [f"curate.sources=[{corpus}]", "curate.shard_bytes=3000", f"curate.out={killed}"]
    process = Command("curate", *words, "cluster.executor=plain", environment=environment,
                      folder=tmp_path)  # fmt: skip
    deadline_s = time.monotonic() + 600
    while not list(killed.glob(".curate/judged/[!.]*/facts.json")) and process.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / RECORD).exists()
    done = run_job("curate", *words, "cluster.num_workers=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(killed / DATA)
    (killed / "report.html").unlink()

    (tmp_path / "whole").mkdir()
    config = CurateJobConfig(curate=CurateConfig(sources=[str(corpus)], shard_bytes=3000))
    write_corpus(config, tmp_path / "whole", in_process, Told())  # type: ignore[arg-type]
    found = {name: raw for name, raw in contents(killed).items() if name != ".lock"}
    assert found == contents(tmp_path / "whole")
    lines = b"".join(raw for name, raw in found.items() if name.startswith(DATA)).splitlines()
    assert len(lines) == 361

    tokens = f"tokenize.out={tmp_path / 'tokens'}"
    model = (f"model.path={tiny_model_dir}", "data.sequence_length=32", "cluster.executor=plain")
    done = run_job("tokenize", f"data.train={killed / DATA}", tokens, *model)
    assert done.returncode == 0, done.stderr
