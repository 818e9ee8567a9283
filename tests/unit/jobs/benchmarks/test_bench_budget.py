"""One budget spent three ways: what each side is given, and the table."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest

from conf.options.pretrain import PretrainConfig
from jobs.benchmarks import budget
from jobs.benchmarks.support.record import render
from jobs.cli.compose import load_config
from sparsify.errors import InputError


def options(*words: str) -> Namespace:
    parser = ArgumentParser()
    budget.add_arguments(parser)
    return parser.parse_args(list(words))


def test_all_sides_cost_the_same_and_the_small_one_is_as_large_as_the_packed_one() -> None:
    plan = budget.make_plan(options(), 4096)
    flops, step = plan.flops(), 4096
    for side in ("recovered", "small"):
        assert flops[side] == pytest.approx(flops["large"], rel=2 * step / plan.num_tokens)
    assert flops["recovered"] - flops["short"] == pytest.approx(0.2 * flops["large"], rel=0.05)
    assert plan.small_tokens > plan.num_tokens > plan.short_tokens + plan.recovery_tokens
    large, small = plan.large.facts(), plan.small.facts()
    assert small["dense_bytes"] == pytest.approx(large["packed_bytes"], rel=0.1)
    assert small["dense_bytes"] == 2 * small["num_parameters"]


def test_an_operation_is_counted_as_the_model_asks_for_it() -> None:
    """Of the packed size and the work, by hand, for a model of one block."""
    size = budget.Size(8, 16, 1, 257, 32)
    blocks = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    facts = size.facts()
    assert facts["packed_bytes"] == facts["dense_bytes"] - blocks * 7 / 8
    one = size.flops().forward([32])
    assert one == 2 * 32 * (blocks + 257 * 8) + 4 * 8 * 32**2 / 2
    plan = budget.Plan(size, size, 64, 32, 32, 64)
    assert plan.flops()["recovered"] == 3 * one + 4 * one


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--width", "8"], "--width 8: there is no smaller model"),
        (["--tokens", "4096"], "less than a step of 4096 tokens"),
        (["--recovery-share", "1"], "--recovery-share 1: less than a step"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        budget.make_plan(options(*words), 4096)


def test_the_commands_are_ones_and_their_figures_make_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    plan = budget.make_plan(options(), 4096)
    monkeypatch.setattr(budget, "make_plan", lambda *_: plan)

    def run(words: list[str]) -> None:
        config = load_config(words[0].removeprefix("jobs."), words[1:])
        asked.append(config)
        folder = Path(config.run.dir)
        is_small = config.pretrain.hidden_size < 96
        names = {"dense": 8.0 + config.run.seed - 2 * is_small}
        if "distill" in config.stages:
            names = {"dense": 9.0, "sparsegpt": 20.0, "recovered": 7.0}
        folder.mkdir(parents=True)
        rows = [{"name": name, "perplexity": value} for name, value in names.items()]
        facts = {"num_workers": 2, "device": "cpu"}
        (folder / "summary.json").write_text(json.dumps({"results": rows, "run": facts}))

    monkeypatch.setattr(budget.commands, "run_command", run)
    given = options("--seeds", "2")
    given.workdir = tmp_path
    outcome = budget.run(given)
    assert len(asked) == 8
    assert [config.pretrain.tokenizer is None for config in asked[:3]] == [True, False, False]
    assert asked[3].model.path == str(tmp_path / "budget/short-seed0/pretrain/model")
    assert {config.run.seed for config in asked} == {0, 1}
    assert PretrainConfig().learning_rate == asked[0].pretrain.learning_rate
    small = outcome.figures["small"]
    assert (small["perplexity"], small["spread"]) == (6.5, 1.0)
    assert outcome.figures["recovered"]["laws"] == {}
    assert outcome.summary is not None
    assert outcome.summary["best"] == "small"
    lines = render(outcome).splitlines()
    assert lines[0].split()[:4] == ["side", "parameters", "bytes", "tokens"]
    assert lines[6].startswith("dense small, for longer")
