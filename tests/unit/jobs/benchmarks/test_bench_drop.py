"""The comparison of rules for dropping layers: its commands, figures and tables. Runs nothing."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config
from jobs import bench
from jobs.benchmarks import drop
from jobs.benchmarks.support import commands
from jobs.cli.compose import load_config
from sparsify.errors import InputError

EMBEDDED = commands.parse_model("embedded")


def options_of(*words: str) -> Namespace:
    return bench.parser().parse_args(["drop", *words])


@cache
def configs() -> dict[str, Config]:
    """Name -> config of every command: two layers, 5000 tokens, seed 1, QLoRA after greedy."""
    words = ("--layers", "2", "--tokens", "5000", "--seeds", "1", "--qlora", "greedy")
    runs = drop.planned(EMBEDDED, options_of(*words), Path("out"))
    return {run_dir.name: load_config("prune", words[1:]) for run_dir, words in runs.items()}


def test_every_command_has_a_folder_and_drops_what_it_is_told() -> None:
    for name, config in configs().items():
        assert config.cluster.executor == "plain", name
        assert config.run.dir == f"out/embedded/{name}"
        assert ("drop" in config.stages) == (config.drop.num_layers is not None)


def test_rules_are_given_as_many_layers() -> None:
    rules = [configs()[name].drop for name in drop._RULES]
    assert [one.rule for one in rules] == ["angular", "deepest", "greedy", "greedy"]
    assert [one.num_layers for one in rules] == [2, 2, 2, 4], "two sublayers are a layer"
    assert rules[-1].candidates == ["attention", "mlp"]


def test_both_orders_train_on_as_many_tokens_and_prune_alike() -> None:
    pruned, first, last = (configs()[f"{name}-1"] for name in drop._ORDERS)
    assert first.distill.num_tokens == pruned.distill.num_tokens + last.distill.num_tokens
    assert first.stages == ["drop", "prune", "distill", "evaluate"]
    assert pruned.stages == ["prune", "distill", "evaluate"]
    assert last.stages == ["drop", "distill", "evaluate"]
    assert last.run.from_ == pruned.run.dir
    assert first.prune == pruned.prune
    assert first.drop == last.drop
    assert {one.run.seed for one in (pruned, first, last)} == {1}


def test_qlora_heals_what_its_rule_dropped_by_the_published_recipe() -> None:
    config = configs()["qlora"]
    assert config.run.from_ == "out/embedded/greedy/drop"
    assert (config.finetune.adapter, config.finetune.targets) == ("qlora", ["*.mlp.*"])
    assert (config.finetune.num_tokens, config.data.sequence_length) == (5000, 256)
    options = options_of("--qlora", "none")
    assert "qlora" not in {path.name for path in drop.planned(EMBEDDED, options, Path("out"))}


def test_a_rule_for_qlora_that_is_not_run_is_refused(tmp_path: Path) -> None:
    options = options_of("--rules", "deepest", "--workdir", str(tmp_path))
    with pytest.raises(InputError, match="--qlora angular"):
        drop.run(options)


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Any]:
    """What is collected of a dense model at 4 that lost layers and is healed half-way."""
    options = options_of("--rules", "angular", "greedy-sublayers", "--seeds", "0")

    def leave(name: str, rows: dict[str, float], **stages: dict[str, Any]) -> None:
        folder = tmp_path / name
        folder.mkdir()
        results = [
            {"name": name, "perplexity": value, "kl": 0.1, "top1_agreement": 0.5}
            for name, value in rows.items()
        ]
        (folder / "summary.json").write_text(json.dumps({"results": results}))
        for stage, metrics in stages.items():
            (folder / stage).mkdir()
            (folder / stage / "record.json").write_text(json.dumps({"metrics": metrics}))

    trained = {"num_tokens": 300, "tokens_per_s": 100.0}
    layer = {"dropped_layers": [1, 2], "dropped_sublayers": []}
    parts = {"dropped_layers": [], "dropped_sublayers": [{"layer": 0, "part": "mlp"}]}
    scores = {"dense": 4.0, "dropped": 16.0}
    leave("angular", {**scores, "recovered": 8.0}, drop=layer, distill=trained)
    leave("greedy-sublayers", {**scores, "recovered": 4.0}, drop=parts, distill=trained)
    leave("qlora", {**scores, "finetuned": 16.0}, finetune=trained)
    leave("pruned-0", {"recovered": 5.0}, distill=trained)
    leave("first-0", {"recovered": 9.0}, drop=layer, distill={**trained, "num_tokens": 600})
    leave("last-0", {"recovered": 7.0}, drop=layer, distill=trained)
    names = ("angular", "greedy-sublayers", "qlora", "pruned-0", "first-0", "last-0")
    return drop.collect(options, {name: tmp_path / name for name in names})


def test_figures_come_from_what_the_commands_left(figures: dict[str, Any]) -> None:
    angular, parts, qlora = figures["rules"]
    # ln 16 - ln 4 is twice ln 16 - ln 8: half of what was lost is won back.
    assert math.isclose(angular["gap_healed"], 0.5)
    assert (angular["dropped"], angular["seconds"]) == ("layers 1, 2", 3.0)
    assert math.isclose(parts["gap_healed"], 1.0)
    assert parts["dropped"] == "mlp of 0"
    assert (qlora["healing"], qlora["dropped"], qlora["gap_healed"]) == ("qlora", "layers 1, 2", 0)
    assert [row["num_tokens"] for row in figures["orders"]] == [300, 600, 600]
    assert [row["perplexity"] for row in figures["orders"]] == [5.0, 9.0, 7.0]
    json.dumps(figures, allow_nan=False)


def test_tables_say_both_healings_and_both_orders(figures: dict[str, Any]) -> None:
    text = drop.markdown({"small": figures}, "python -m x")
    assert "```\npython -m x\n```" in text
    line = "| angular | layers 1, 2 | 16.000 | 0.1000 | 8.000 | 0.1000 | 50.0 % | 3 |"
    assert line in text
    assert "| angular, by QLoRA | layers 1, 2 | 16.000 | 0.1000 | 16.000 | 0.1000 | 0.0 % |" in text
    assert "| drop, prune, recover, seed 0 | layers 1, 2 | 600 | 9.000 |" in text
    assert "| prune, recover, drop, recover, seed 0 | layers 1, 2 | 600 | 7.000 |" in text
