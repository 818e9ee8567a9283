"""The rows of a recovery's steps: the file they are kept in, and each worker's share of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.stages import StagedClusterSpec
from conf.options.data import DataConfig
from conf.options.distill import DistillConfig
from conf.options.model import ModelConfig
from conf.options.tokenize import TokenizeJobConfig
from conf.schema import Config
from jobs.training.batches import Batches
from jobs.workers import distill
from jobs.workers.distill import prepare_rows
from jobs.workers.tokenize import write_store
from sparsify.costs.flops import count_flops
from sparsify.data.rows import TokenRows
from sparsify.data.store import TokenStore
from sparsify.data.store_write import write_rows
from sparsify.data.teacher_samples import (
    Sample,
    SampleFacts,
    TeacherSamples,
    write_sample_manifest,
    write_samples,
)
from sparsify.distillation import TokenCounts
from sparsify.models.load import load_model, load_tokenizer


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (1, 2), (2, 2), (4, 1)])
def test_shares_of_a_step_are_its_rows_and_divide_by_its_tokens(
    isolate, world_size, micro_batch_size, tiny_model_dir, tmp_path
):
    source = tmp_path / "text.txt"
    source.write_text("\n<|endoftext|>\n".join("the cat sat " * (i % 5 + 1) for i in range(90)))
    config = Config(
        data=DataConfig(calibration=str(source), sequence_length=16, isolate_documents=isolate),
        distill=DistillConfig(num_tokens=384, batch_size=8, micro_batch_size=micro_batch_size),
        cluster=StagedClusterSpec(num_workers=world_size),
    )
    payload = {"config": config, "teacher": tiny_model_dir, "store": tmp_path / "rows"}
    prepare_rows(SimpleNamespace(num_threads=1, warn=lambda text: None), payload)
    store = TokenStore.open(tmp_path / "rows")
    assert len(store) == 24
    alone = Batches(store, config.distill, 0, 0, 1, isolate, None)
    seen = []
    for step in range(3):
        shares, sums, crcs = [], torch.zeros(3, dtype=torch.float64), set()
        for rank in range(world_size):
            worker = Batches(store, config.distill, 0, rank, world_size, isolate, None)
            batch = worker.at(step)
            pieces = worker.micro_batches(batch, "cpu")
            assert [len(piece) for piece in pieces] == [micro_batch_size] * len(pieces)
            shares += pieces
            sums += batch.own
            crcs.add(batch.row_crc)
        assert crcs == {alone.at(step).row_crc}
        seen += store.order(0).batch(step, 8).tolist()
        rows = TokenRows.joined(shares)
        assert len(rows) == 8
        assert rows.is_joined == isolate
        whole = TokenCounts.of(rows)
        parts = [TokenCounts.of(part) for part in shares]
        assert (whole.kl, whole.ce) == (sum(p.kl for p in parts), sum(p.ce for p in parts))
        # One count for all micro-batches of all workers: their mean is the whole step's.
        assert alone.shares(sums) == whole.shared_by(len(shares))
        if isolate:
            assert whole.ce < 8 * 15
        else:
            assert (whole.kl, whole.ce) == (8 * 16, 8 * 15)
        assert rows.ids_NT.dtype == rows.positions_NT.dtype == torch.int64
    assert sorted(seen) == list(range(24)), "every row once"


class _Cluster:
    """Does tasks here, at most so many."""

    def __init__(self, most: int) -> None:
        self.left = most

    def run_tasks(self, name: str, work: Any, payloads: list[Any], what: str) -> None:
        for payload in payloads:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            work(SimpleNamespace(num_threads=1), payload)


def test_more_text_than_one_task_holds_is_tokenised_by_all(tiny_model_dir, tmp_path, monkeypatch):
    """The store of `jobs.tokenize`; what was interrupted makes the pieces that are missing."""
    texts = [tmp_path / f"{number}.txt" for number in range(3)]
    for number, path in enumerate(texts):
        path.write_text("\n<|endoftext|>\n".join(f"{i} cats sat {number} " for i in range(200)))
    config = Config(
        data=DataConfig(mix=[f"1 {path}" for path in texts], sequence_length=16),
        distill=DistillConfig(num_tokens=384, batch_size=8, micro_batch_size=4),
    )
    payload = {"config": config, "teacher": tiny_model_dir, "store": tmp_path / "rows"}
    monkeypatch.setattr(distill, "_TOKENS_AT_ONCE", 383)
    prepare_rows(SimpleNamespace(num_threads=1, warn=lambda text: None), payload)
    assert not payload["store"].exists(), "left to all workers"
    display: Any = SimpleNamespace(say=lambda text: None, on_event=lambda event: None)
    with pytest.raises(KeyboardInterrupt):
        distill.tokenize_in_shards("distill", payload, _Cluster(2), display)
    assert not distill.has_rows(payload)
    distill.tokenize_in_shards("distill", payload, _Cluster(1), display)
    assert distill.has_rows(payload)
    distill.tokenize_in_shards("distill", payload, _Cluster(0), display)  # is there already
    store = TokenStore.open(payload["store"])
    assert [source.weight for source in store.sources] == [1 / 3] * 3
    job = TokenizeJobConfig(ModelConfig(path=str(tiny_model_dir)), config.data)
    (tmp_path / "other").mkdir()
    write_store(
        job, tmp_path / "other", lambda work, tasks: _Cluster(3).run_tasks("", work, tasks, ""),
        display,
    )  # fmt: skip
    assert store.digest == TokenStore.open(tmp_path / "other").digest


@pytest.mark.parametrize("world_size", [1, 2])
def test_samples_are_those_of_the_rows_and_the_teacher_costs_nothing(
    world_size: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(len(tokenizer), (24, 16), generator=generator)
    write_rows(tmp_path / "rows", {"train": TokenRows.whole(ids_NT)}, tokenizer, 16)
    store = TokenStore.open(tmp_path / "rows")
    # The sample of a token is the token itself, so that the two can be held against each other.
    facts = SampleFacts(store.digest, "", "float32", 1, 1.0, 1.0, 0, True, 16, len(tokenizer))
    one, entropy = torch.ones(16, 1), torch.zeros(16)
    samples = (Sample(row[:, None], one, entropy, 1.0) for row in ids_NT)
    shard = write_samples(tmp_path / "samples", samples, 24, facts)
    write_sample_manifest(tmp_path, facts, [shard])
    cache = TeacherSamples.open(tmp_path)
    settings = DistillConfig(num_tokens=384, batch_size=8, micro_batch_size=2)
    flops = count_flops(load_model(tiny_model_dir))
    for rank in range(world_size):
        worker = Batches(store, settings, 0, rank, world_size, True, (flops, None), cache)
        taught = Batches(store, settings, 0, rank, world_size, True, (flops, flops))
        for step in range(3):
            batch = worker.at(step)
            parts, drawn = worker.micro_batches(batch, "cpu"), worker.samples(batch, "cpu")
            assert len(parts) == len(drawn) == 4 // world_size
            for rows, sample in zip(parts, drawn, strict=True):
                assert sample is not None
                assert torch.equal(sample.ids_NK[:, 0], rows.ids_NT.flatten())
            plain = taught.at(step)
            assert taught.samples(plain, "cpu") == [None] * len(parts)
            # Three forwards of the student in place of four of two equal models.
            assert 4 * batch.own[2] == 3 * plain.own[2]
