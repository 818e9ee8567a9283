"""What is recomputed under ZeRO, on gloo processes: the same training as when all is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.recoveries import BATCH, LENGTH, make_recovery, run, state_hash


def train_each_way(rank: int, base: Path, out: Path, stage: int) -> None:
    """Two steps that keep everything, and two of each way to recompute, of half of the blocks and
    of all."""
    found = []
    for name, share in (("whole", 0.0), ("whole", 0.5), ("elementwise", 0.5), ("elementwise", 1.0)):
        recovery, _ = make_recovery(
            base, out / f"{name}-{share}", zero_stage=stage, num_tokens=2 * BATCH * LENGTH,
            recompute_share=share, recompute=name,
        )  # fmt: skip
        recovery.train()
        losses = [(row["loss"], row["grad_norm"]) for row in recovery.curve]
        found.append((losses, state_hash(recovery)))
    assert len(found[0][0]) == 2
    assert all(each == found[0] for each in found[1:])


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_recomputed_trains_the_same_weights(base: Path, tmp_path: Path, stage: int) -> None:
    run(2, train_each_way, base, tmp_path, stage)
