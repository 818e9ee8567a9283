"""What a run says of its stages: how they ended, or how far they were when a signal came."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jobs.pipeline import PIPELINE, _so_far
from jobs.runs.display import Display
from jobs.stages import distill, drop, finetune, pretrain

ASKED = [stage for stage in PIPELINE if stage.name in ("prune", "distill", "evaluate")]


def so_far(done: list[str], *events: dict[str, Any], stage: str = "prune") -> str:
    display = Display()
    display.start_stage(stage)
    for event in events:
        display.on_event(event)
    context: Any = SimpleNamespace(statuses=dict.fromkeys(done, "ran"), display=display)
    return _so_far(context, ASKED)


def progress(done: int, text: str) -> dict[str, Any]:
    return {"kind": "progress", "name": "prune", "done": done, "total": 16, "text": text}


def test_it_says_how_far_the_stage_is_and_what_is_finished() -> None:
    assert so_far([], progress(3, "blocks"), progress(4, "blocks")) == (
        "in prune at 4/16 blocks; finished: no stage; run the same command again: "
        "prune continues after the last block whose state is on disk"
    )
    assert so_far(["prune"], progress(2, "steps"), stage="distill") == (
        "in distill at 2/16 steps; finished: prune; run the same command again: "
        "distill continues after its last checkpoint"
    )


def test_between_stages_progress_of_the_last_one_says_nothing() -> None:
    assert so_far(["prune", "distill"], progress(16, "steps"), stage="distill") == (
        "in evaluate; finished: prune, distill; run the same command again: "
        "evaluate starts over, but for benchmark tasks that are answered"
    )


@pytest.mark.parametrize("stage", PIPELINE)
def test_every_stage_says_how_it_resumes(stage: Any) -> None:
    assert stage.resumes.split()[0] in ("continues", "starts")


def test_after_the_last_stage_the_summary_is_left() -> None:
    done = [stage.name for stage in ASKED]
    assert so_far(done, stage="evaluate").endswith("run the same command again for the summary")


def test_the_outcome_of_a_stage_is_said_in_figures() -> None:
    gone = {
        "num_layers_before": 4, "dropped_layers": [1], "rule": "greedy",
        "dropped_sublayers": [{"layer": 2, "part": "mlp"}], "rounds": [{"kl": 0.96612}],
    }  # fmt: skip
    said = drop.STAGE.told
    assert said is not None
    assert said(gone) == ("dropped layer 1, mlp of 2 of 4 layers (greedy, KL 0.966 nats per token)")
    named = {**gone, "rule": "layers", "rounds": [], "dropped_sublayers": []}
    assert said(named) == "dropped layer 1 of 4 layers (as named)"


@pytest.mark.parametrize("stage", [distill, finetune, pretrain])
def test_the_outcome_of_a_training_is_its_loss(stage: Any) -> None:
    steps = [{"step": 1, "loss": 2.51234}, {"step": 9, "loss": 0.12345}]
    said = stage.STAGE.told
    assert said({"steps": steps, "num_tokens": 36864}) == (
        "9 steps, 36,864 tokens, loss 2.51 to 0.123"
    )
    steps[0]["loss"] = None  # left out: it was not finite
    assert said({"steps": steps, "num_tokens": 36864}).endswith("loss – to 0.123")
