"""The rows of a recovery's steps: the file they are kept in, and each worker's share of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cluster.spec import ClusterSpec
from conf.schema import Config, DataConfig
from conf.stages import DistillConfig
from jobs._batches import Batches
from jobs.distill import prepare_rows
from sparsify.loss_terms import TokenCounts
from sparsify.store import TokenStore
from sparsify.text import TokenRows


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
        cluster=ClusterSpec(num_workers=world_size),
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
        seen += alone.order.batch(step, 8).tolist()
        rows = TokenRows.joined(shares)
        assert len(rows) == 8
        assert rows.is_packed == isolate
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
