"""The comparison of recovery recipes: its commands, figures, tables and page. Runs nothing."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest

from jobs import bench
from jobs.benchmarks import recovery
from jobs.benchmarks.support import commands
from jobs.benchmarks.support.page import write_page
from jobs.cli.compose import load_config
from sparsify.errors import InputError

EMBEDDED = commands.parse_model("embedded")


def options_of(*words: str):
    return bench.parser().parse_args(["recovery", *words])


@pytest.fixture
def figures(tmp_path) -> dict:
    """What is collected from a pruned model at 16, dense at 4, and four runs."""

    def leave(folder: Path, rows: dict[str, float], **metrics: float | None) -> Path:
        (folder / "distill").mkdir(parents=True)
        results = [
            {"name": name, "perplexity": value, "kl": 0.1, "top1_agreement": 0.5}
            for name, value in rows.items()
        ]
        (folder / "summary.json").write_text(json.dumps({"results": results}))
        metrics = {"num_tokens": 300, "tokens_per_s": 100.0, "mask_share_moved": None, **metrics}
        (folder / "distill" / "record.json").write_text(json.dumps({"metrics": metrics}))
        return folder

    start = leave(tmp_path / "start", {"dense": 4.0, "sparsegpt": 16.0})
    found = {
        ("kl", 0): leave(tmp_path / "a", {"recovered": 8.0}),
        ("kl", 1): leave(tmp_path / "b", {"recovered": 4.0}),
        ("kl-moving", 0): leave(tmp_path / "c", {"recovered": 16.0}, mask_share_moved=0.25),
        ("dense-ce", 0): leave(tmp_path / "d", {"recovered": 2.0}),
        ("dense-ce-low", 0): leave(tmp_path / "e", {"recovered": 3.2}),
    }
    return recovery.collect(start, "sparsegpt", found)


@pytest.mark.parametrize("name", recovery._RECIPES)
def test_every_recipe_is_a_command_that_can_be_read(name, tmp_path) -> None:
    options = options_of("--tokens", "5000", "--set", "data.sequence_length=64")
    target = tmp_path / "out"
    words = recovery.recover_words(EMBEDDED, options, tmp_path / "start", target, name, 1)
    assert words[0] == "jobs.prune"
    config = load_config("prune", words[1:])
    assert (config.run.seed, config.distill.num_tokens) == (1, 5000)
    assert config.data.sequence_length == 64
    is_dense = name.startswith("dense")
    assert config.run.from_ == ("embedded" if is_dense else str(tmp_path / "start/prune/sparsegpt"))
    assert config.prune.skip == (["*"] if is_dense else [])


def test_recipes_are_what_their_names_say(tmp_path) -> None:
    @cache
    def distill(name: str):
        words = recovery.recover_words(EMBEDDED, options_of(), tmp_path, tmp_path, name, 0)
        return load_config("prune", words[1:]).distill

    def weights(name: str) -> tuple[float, float, float, float]:
        found = distill(name)
        return (
            found.kl_weight, found.reverse_kl_weight, found.ce_weight, found.square_head_weight,
        )  # fmt: skip

    assert weights("kl") == weights("kl-t2") == weights("kl-moving") == (1, 0, 0, 0)
    assert weights("ce") == weights("dense-ce") == (0, 0, 1, 0)
    assert weights("ce-squarehead") == (0, 0, 1, 1)
    assert weights("kl-both") == (0.5, 0.5, 0, 0)
    assert (distill("kl").temperature, distill("kl-t2").temperature) == (1, 2)
    losses = distill("kl-squarehead-tenth").losses()
    assert losses.at(0.0).square_head == 1
    assert losses.at(0.1).square_head == 0
    shares = [distill(name).moving_share for name in recovery._RECIPES]
    assert sum(share > 0 for share in shares) == 4
    dense = [name for name in recovery._RECIPES if distill(name).moving_start == "dense"]
    assert dense == ["kl-moving-dense", "kl-moving-dense-half"]
    assert distill("dense-ce-low").learning_rate * 10 == distill("dense-ce").learning_rate


def test_the_first_recipe_is_the_default(tmp_path) -> None:
    words = recovery.recover_words(EMBEDDED, options_of(), tmp_path, tmp_path, "kl", 0)
    plain = [word for word in words if not word.startswith("distill.") or "num_tokens" in word]
    assert load_config("prune", words[1:]).distill == load_config("prune", plain[1:]).distill


def test_a_dense_model_continued_has_no_zeros_to_hold() -> None:
    from sparsify.models.load import load_model
    from sparsify.models.masked import infer_masks
    from sparsify.pattern import Pattern

    model = load_model("embedded")
    assert infer_masks(model, Pattern.parse("2:4"), ["*"]) == {}


def test_the_pruned_model_is_of_one_method(tmp_path) -> None:
    words = recovery.prune_words(EMBEDDED, options_of("--start", "wanda"), tmp_path)
    config = load_config("prune", words[1:])
    assert (config.prune.method, config.prune.baselines) == ("wanda", [])
    assert config.stages == ["prune", "evaluate"]


def test_repeated_recipes_run_with_two_seeds() -> None:
    options = options_of("--recipes", "ce", "kl", "--repeat", "kl")
    assert recovery.planned(options) == [("kl", 0), ("kl", 1), ("ce", 0)]
    assert recovery.planned(options_of("--recipes", "ce")) == [("ce", 0)]


def test_figures_come_from_what_the_commands_left(figures) -> None:
    first, second, moved, *_ = figures["rows"]
    # ln 16 - ln 4 is twice ln 16 - ln 8: half of what was lost is won back.
    assert math.isclose(first["gap_recovered"], 0.5)
    assert math.isclose(second["gap_recovered"], 1.0)
    assert moved["gap_recovered"] == 0
    assert (first["seconds"], moved["mask_share_moved"]) == (3.0, 0.25)
    assert first["over_continued"] == 3.0  # over the better of the two continued
    json.dumps(figures, allow_nan=False)


def test_without_a_dense_model_continued_nothing_is_held_against_it(tmp_path, figures) -> None:
    rows = [row for row in figures["rows"] if not row["recipe"].startswith("dense")]
    found = recovery.collect(
        tmp_path / "start", "sparsegpt", {(r["recipe"], r["seed"]): tmp_path / "a" for r in rows}
    )
    assert {row["over_continued"] for row in found["rows"]} == {None}


def test_nothing_lost_is_no_division_by_zero() -> None:
    assert recovery.gap_recovered(4.0, 4.0, 4.0) is None


def test_the_tables_replace_those_of_the_page_and_nothing_else(tmp_path, figures) -> None:
    page = tmp_path / "docs" / "recovery.md"
    write_page(page, recovery.markdown({"embedded": figures}, "python -m x"), "tables", "Title")
    text = page.read_text()
    assert "```\npython -m x\n```" in text
    assert "| KL, seed 1 | 4.000 | 0.1000 | 50.0 % | 100.0 % | 100.0 % |  | 3 |" in text
    assert "| pruned, sparsegpt | 16.000 |" in text
    page.write_text(f"before\n{text}after\n")
    write_page(page, recovery.markdown({"other": figures}, "python -m y"), "tables", "Title")
    changed = page.read_text()
    assert changed == f"before\n{text}after\n".replace("python -m x", "python -m y").replace(
        "embedded", "other"
    )


def test_a_page_without_its_marks_is_refused(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("by hand\n")
    with pytest.raises(InputError, match="tables: begin"):
        write_page(page, "table", "tables", "Title")
    assert page.read_text() == "by hand\n"


def test_every_place_of_a_page_has_tables_of_its_own(tmp_path) -> None:
    page = tmp_path / "page.md"
    write_page(page, "first", "tables", "Title")
    page.write_text(f"{page.read_text()}<!-- twofour: begin -->\n<!-- twofour: end -->\n")
    write_page(page, "second", "twofour", "Title")
    write_page(page, "third", "tables", "Title")
    words = [line for line in page.read_text().split("\n") if line and line[0] not in "#<"]
    assert words == ["third", "second"]
