"""Words of evaluate.tasks: what they stand for, and what is said of those that do not fit."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.options.evaluate import EvaluateConfig
from jobs.harness import catalog as catalogs
from jobs.harness.definitions import Function
from jobs.harness.plan import OWN, PRESETS, planned, presets
from sparsify.errors import InputError
from tests.conftest import message

CHOICE: dict[str, Any] = {
    "task": "choice", "dataset_path": "json", "output_type": "multiple_choice",
    "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}},
    "test_split": "test", "fewshot_split": "train", "doc_to_text": "{{text}}",
    "doc_to_choice": ["no", "yes"], "doc_to_target": "{{label}}",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task file with its data beside it."""
    for split in ("train", "test"):
        rows = [{"text": f"{split} {number}", "label": number % 2} for number in range(4)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def write(path: Path, content: Any) -> str:
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


def plan(word: str, num_fewshot: int | None = None, may_run_code: bool = False) -> Any:
    return planned([word], num_fewshot, may_run_code)


def refused(word: str, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        plan(word, **options)
    return message(error)


# --- what words stand for


def test_data_files_are_those_beside_the_task_file(folder: Path) -> None:
    found = plan(write(folder / "choice.yaml", CHOICE), num_fewshot=3)
    files = found.tasks["choice"].config["dataset_kwargs"]["data_files"]
    assert files == {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    assert [(row.section, row.name, row.tasks) for row in found.rows] == [
        (OWN, "choice", ("choice",))
    ]
    assert found.num_fewshot == {"choice": 3}


def test_digest_follows_definition_and_data(folder: Path) -> None:
    word = write(folder / "choice.yaml", CHOICE)
    first = plan(word).tasks["choice"].digest
    assert plan(word).tasks["choice"].digest == first
    write(folder / "test.jsonl", '{"text": "other", "label": 0}\n')
    second = plan(word).tasks["choice"].digest
    write(folder / "choice.yaml", {**CHOICE, "doc_to_text": "{{text}}?"})
    assert len({first, second, plan(word).tasks["choice"].digest}) == 3


def test_includes_and_groups_of_local_files(folder: Path) -> None:
    write(folder / "_base_yaml", {key: value for key, value in CHOICE.items() if key != "task"})
    write(folder / "a.yaml", {"include": "_base_yaml", "task": "a", "num_fewshot": 0})
    write(folder / "b.yaml", {"include": "_base_yaml", "task": "b"})
    members = ["a", {"task": "b", "description": "Say so. "}, {**CHOICE, "task": "c"}]
    group = {
        "group": "abc", "task": members, "target_delimiter": "",
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
    }  # fmt: skip
    found = plan(write(folder / "abc.yaml", group), num_fewshot=2)
    (row,) = found.rows
    assert (row.name, row.tasks, row.metrics, row.by_size) == (
        "abc", ("a", "b", "c"), ("acc",), False
    )  # fmt: skip
    assert found.tasks["b"].config["description"] == "Say so. "
    assert found.tasks["c"].config["target_delimiter"] == ""
    assert found.num_fewshot == {"a": 0, "b": 2, "c": 2}, "a task that says 0 stays at 0"
    del group["aggregate_metric_list"]
    found = plan(write(folder / "abc.yaml", group))
    assert [row.name for row in found.rows] == ["a", "b", "c"], "no score of its own"


def test_python_is_kept_as_a_name_where_it_is_allowed(folder: Path) -> None:
    text = yaml.safe_dump(CHOICE) + "process_docs: !function mine.prepare\n"
    word = write(folder / "choice.yaml", text)
    write(folder / "mine.py", "raise SystemExit('it was run')\n")
    found = plan(word, may_run_code=True).tasks["choice"]
    assert found.config["process_docs"] == Function(str(folder), "mine.prepare")
    write(folder / "mine.py", "def prepare(docs): return docs\n")
    assert plan(word, may_run_code=True).tasks["choice"].digest != found.digest


# --- the harness's own tasks, and presets made of them


def test_every_preset_names_tasks_metrics_and_shots_of_the_harness() -> None:
    first, second = (plan(f"open-llm-leaderboard-v{number}") for number in (1, 2))
    assert presets() == ["open-llm-leaderboard-v1", "open-llm-leaderboard-v2"]
    assert [(row.name, len(row.tasks), row.metrics, row.lowest) for row in first.rows] == [
        ("ARC-Challenge", 1, ("acc_norm,none",), None),
        ("MMLU", 57, ("acc,none",), None),
        ("HellaSwag", 1, ("acc_norm,none",), None),
        ("WinoGrande", 1, ("acc,none",), None),
        ("GSM8K", 1, ("exact_match,strict-match",), None),
        ("TruthfulQA", 1, ("acc,none",), None),
    ]
    shots = {row.name: {first.num_fewshot[task] for task in row.tasks} for row in first.rows}
    assert shots == {
        "ARC-Challenge": {25}, "MMLU": {5}, "HellaSwag": {10}, "WinoGrande": {5}, "GSM8K": {5},
        "TruthfulQA": {0},
    }  # fmt: skip
    assert [(row.name, len(row.tasks)) for row in second.rows] == [
        ("IFEval", 1), ("BBH", 24), ("MATH Lvl 5", 7), ("GPQA", 3), ("MuSR", 3), ("MMLU-Pro", 1),
    ]  # fmt: skip
    lowest = {row.name: row.lowest for row in second.rows}
    assert lowest["GPQA"] == (0.25,) * 3 and lowest["MMLU-Pro"] == (0.1,)
    assert lowest["MuSR"] == pytest.approx((0.5, 0.2, 1 / 3))
    assert lowest["MATH Lvl 5"] == (0.0,) * 7
    bbh = dict(zip(second.rows[1].tasks, lowest["BBH"] or (), strict=True))
    assert bbh["leaderboard_bbh_boolean_expressions"] == 1 / 2
    assert bbh["leaderboard_bbh_geometric_shapes"] == 1 / 11


def test_names_are_those_that_the_harness_has() -> None:
    """Against its own index of one folder with groups, tags and templates."""
    from lm_eval.tasks import TaskManager

    folder = catalogs.installed_tasks() / "mmlu"
    found, theirs = catalogs.catalog(folder), TaskManager(
        include_path=str(folder), include_defaults=False
    )  # fmt: skip
    assert sorted(found.tasks) == theirs.all_subtasks
    assert sorted(found.groups) == theirs.all_groups
    assert sorted(found.tags) == theirs.all_tags
    tags = {name: sorted(theirs.task_index[name].tags) for name in theirs.all_tags}
    assert {name: sorted(tasks) for name, tasks in found.tags.items()} == tags


def test_group_of_the_harness_counts_by_size() -> None:
    (row,) = plan("mmlu").rows
    assert (len(row.tasks), row.metrics, row.by_size) == (57, ("acc",), True)


# --- what is refused, each in one line


def test_unknown_names() -> None:
    assert "did you mean gsm8k?" in refused("gsm8kk")
    assert "did you mean open-llm-leaderboard-v1?" in refused("open-llm-leaderbord-v1")
    assert "there is no such file" in refused("nothing/here.yaml")


def test_a_harness_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert 'pip install "twofour[eval]"' in refused("gsm8k")


def test_python_in_a_task_file(folder: Path) -> None:
    text = yaml.safe_dump(CHOICE) + "process_docs: !function mine.prepare\n"
    said = refused(write(folder / "choice.yaml", text))
    assert "evaluate.allow_task_code=true" in said and "mine.prepare" in said
    said = refused(write(folder / "runs.yaml", {**CHOICE, "unsafe_code": True}))
    assert "runs code that the model writes" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "gone.jsonl is not there"),
        ({"test_split": "exam"}, "test_split: exam is no split"),
        ({"task": None}, "no 'task' in it"),
        ({"include": "gone_yaml"}, "there is no such file"),
        ({"include": "choice.yaml"}, "includes itself"),
    ],
)
def test_definitions(folder: Path, change: dict[str, Any], said: str) -> None:
    assert said in refused(write(folder / "choice.yaml", {**CHOICE, **change}))


def test_files_that_are_no_definitions(folder: Path) -> None:
    assert "not valid YAML" in refused(write(folder / "a.yaml", "a: [1"))
    assert "no definition of a task" in refused(write(folder / "a.yaml", "- a\n"))
    assert "has no tasks" in refused(write(folder / "a.yaml", {"group": "empty", "task": []}))


def test_data_that_do_not_fit_each_other(folder: Path) -> None:
    word = write(folder / "choice.yaml", CHOICE)
    write(folder / "test.jsonl", '{"text": "a", "label": 0, "id": 7}\n')
    said = refused(word)
    assert "different columns (id in one of them alone)" in said and "test.jsonl" in said
    write(folder / "test.jsonl", '{"text": "a", "label": 0}\n{"text"\n')
    assert "test.jsonl, line 2: no JSON object" in refused(word)


def test_one_task_in_two_ways(folder: Path) -> None:
    word, other = write(folder / "a.yaml", CHOICE), write(folder / "b.yaml", {**CHOICE, "x": 1})
    with pytest.raises(InputError) as error:
        planned([word, other], None, False)
    assert "two different tasks are called choice" in message(error)
    preset = {"rows": [{"name": "Choice", "tasks": ["a.yaml"], "num_fewshot": 2}]}
    with pytest.raises(InputError) as error:
        planned([word, write(folder / "mine.yaml", preset)], None, False)
    assert "with None and with 2 examples" in message(error)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"name": "Choice"}, "each of its rows is a name, tasks"),
        ({"name": "Choice", "tasks": ["choice.yaml"], "shots": 5}, "each of its rows"),
        ({"name": "Choice", "tasks": ["choice.yaml"], "lowest": 1}, "no lowest score of choice"),
    ],
)
def test_presets_that_are_not_written_as_one(folder: Path, row: dict[str, Any], said: str) -> None:
    write(folder / "choice.yaml", CHOICE)
    assert said in refused(write(folder / "mine.yaml", {"rows": [row]}))


def test_shots_beside_a_preset() -> None:
    said = refused("open-llm-leaderboard-v1", num_fewshot=3)
    assert "says the examples of its tasks itself" in said
    assert (PRESETS / "open-llm-leaderboard-v1.yaml").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 4}, "evaluate.limit: is of benchmark tasks"),
        ({"backend": "vllm"}, "evaluate.backend: is of benchmark tasks"),
        ({"tasks": ["a", "a"]}, "names a value twice"),
        ({"tasks": [" "]}, "a name is empty"),
        ({"tasks": ["a"], "backend": "hff"}, "did you mean hf?"),
        ({"tasks": ["a"], "limit": 0}, "must be at least 1"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        EvaluateConfig(**options)
    assert said in message(error)
