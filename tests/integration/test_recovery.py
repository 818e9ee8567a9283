"""The recovery on two gloo processes, disturbed in every way that issues have named.

Killed, stopped, fed with NaN, on other numbers of workers, with damaged checkpoints, on a full
disk: what comes of it is the result of an undisturbed run, or one line that says what to do.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs._checkpoint import finished_steps, name_of
from sparsify.masks import save_masks
from sparsify.pattern import Pattern, keep_mask_from_scores
from tests.integration.recoveries import (
    BATCH,
    LENGTH,
    NUM_STEPS,
    at_step,
    exit_codes,
    log_rows,
    make_recovery,
    results,
    run,
    state_hash,
)

STAGES = (0, 2, 3)


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with masks, its teacher, and rows of random tokens: no two of them are alike."""
    from sparsify.models.load import load_pair, save_model
    from sparsify.store import StoreSource
    from sparsify.store_write import shard_name, write_manifest, write_rows
    from sparsify.text import TokenRows

    folder = tmp_path_factory.mktemp("recovery")
    (folder / "teacher").symlink_to(tiny_model_dir)
    model, tokenizer = load_pair(tiny_model_dir)
    masks = {
        name: keep_mask_from_scores(module.weight.detach().abs(), Pattern.parse("2:4"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    save_model(model, tokenizer, folder / "student")
    save_masks(folder / "student/sparsity/masks.safetensors", masks)
    (folder / "student/sparsity.json").write_text('{"pattern": "2:4"}')
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(len(tiny_tokenizer), (80, LENGTH), generator=generator)
    (folder / "rows").mkdir()
    shard = write_rows(folder / "rows", shard_name(0, 0), TokenRows.whole(ids), tokenizer)
    source = StoreSource("train", 1.0, shard.sha256, (shard,))
    write_manifest(folder / "rows", tokenizer, LENGTH, [source], {})
    return folder


# killed and resumed -----------------------------------------------------------------------------


def train_all(rank: int, base: Path, out: Path, name: str, **settings: Any) -> None:
    """Train to the end in every ZeRO stage, each in a folder of its own."""
    for stage in STAGES:
        folder = out / f"zero-{stage}"
        recovery, worker = make_recovery(base, folder, zero_stage=stage, **settings)
        rows = log_rows(recovery)
        recovery.train()
        found = {**results(recovery), "rows": rows, "said": worker.said}
        torch.save(found, folder / f"{name}-{rank}")


def train_until_killed(rank: int, base: Path, out: Path, stage: int, step: int) -> None:
    recovery, _ = make_recovery(base, out / f"zero-{stage}", zero_stage=stage)
    rows = log_rows(recovery)

    def die() -> None:
        recovery._checkpoints.wait()
        torch.distributed.barrier()
        torch.save(rows, out / f"zero-{stage}" / f"killed-{rank}")
        os.kill(os.getpid(), signal.SIGKILL)

    at_step(recovery, step, die)
    recovery.train()


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run(2, train_all, base, out, "found")
    return out


@pytest.fixture(scope="module")
def resumed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resumed")
    for stage in STAGES:
        codes = exit_codes(2, train_until_killed, base, out, stage, 7)
        assert codes == [-signal.SIGKILL] * 2
    run(2, train_all, base, out, "found")
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_undisturbed_to_the_bit(undisturbed, resumed, stage) -> None:
    for rank in (0, 1):
        one, other = (
            torch.load(out / f"zero-{stage}" / f"found-{rank}") for out in (undisturbed, resumed)
        )
        assert len(one["curve"]) == NUM_STEPS
        assert other["curve"] == one["curve"]
        assert other["state"] == one["state"]
        assert other["model"] == one["model"]
    assert one["curve"][-1]["loss"] < one["curve"][0]["loss"]
