"""Tasks asked of a model: the harness's own numbers, and answers that are kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.harness.plan import Plan, planned
from jobs.harness.run import HFLM, build, language_model, run_task
from sparsify.errors import InputError
from sparsify.models.load import load_tokenizer
from tests.benchmarks import make_tasks
from tests.conftest import message

SETTINGS: dict[str, Any] = {
    "backend": "hf", "dtype": "float32", "batch_size": 4, "max_length": 128, "limit": None,
    "apply_chat_template": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:  # the harness converts data there
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield planned([str(path) for path in make_tasks(folder).values()], None, False)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return language_model(tiny_model_dir, tiny_model_dir, "float32", "cpu", SETTINGS)


def ask(model: Any, plan: Plan, name: str, answers: Path, **options: Any) -> dict[str, Any]:
    settings = {**SETTINGS, **options.pop("settings", {})}
    tell = options.pop("tell", lambda share: None)
    return run_task(model, plan.tasks[name], plan.num_fewshot[name], settings, answers, tell)


def test_numbers_are_those_of_the_command_line(
    plan: Plan, model: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """All tasks in one call, from the folder, with the arguments of the harness's command."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    theirs = simple_evaluate(
        model="hf", model_args={"pretrained": str(tiny_model_dir), "dtype": "float32"},
        tasks=[task.config for task in plan.tasks.values()], device="cpu", batch_size=4,
        task_manager=TaskManager(include_defaults=False), fewshot_as_multiturn=None,
    )  # fmt: skip
    assert theirs is not None
    for name in plan.tasks:
        ours, expected = ask(model, plan, name, tmp_path / name), theirs["results"][name]
        assert len(ours["metrics"]) == 2 and ours["num_documents"] == 12
        for key, metric in ours["metrics"].items():
            assert metric["score"] == expected[key], (name, key)
            stderr = expected[f"{key.replace(',', '_stderr,')}"]
            assert metric["stderr"] == (None if stderr == "N/A" else stderr)
            assert metric["link"] in ("mean", "exp", "bits"), "documents give the score"
            assert len(metric["values"]) == len(ours["doc_hashes"]) == 12
        assert ours["num_fewshot"] == theirs["n-shot"][name]
    better = ask(model, plan, "bits", tmp_path / "again")["metrics"]
    assert not better["bits_per_byte,none"]["higher_is_better"]


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_conversations_are_those_of_the_command_line(
    plan: Plan, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """As with --apply_chat_template, which makes turns of examples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    theirs = simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[task.config for task in plan.tasks.values()], device="cpu", batch_size=4,
        task_manager=TaskManager(include_defaults=False), apply_chat_template=True,
        fewshot_as_multiturn=True, log_samples=True,
    )  # fmt: skip
    assert theirs is not None
    prompt = theirs["samples"]["choice"][0]["arguments"][0][0]
    assert prompt.count("<user>") == 2 and prompt.count("<assistant>") == 2, "an example as turns"
    model = language_model(folder, folder, "float32", "cpu", SETTINGS)
    as_chat = {"settings": {"apply_chat_template": True}}
    for name in plan.tasks:
        ours = ask(model, plan, name, tmp_path / name, **as_chat)["metrics"]
        scores = {key: metric["score"] for key, metric in ours.items()}
        assert scores == {key: theirs["results"][name][key] for key in scores}, name


class Killed(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("name", ["choice", "writes"])
def test_what_was_answered_before_a_kill_is_not_asked_again(
    plan: Plan, model: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    kind = "loglikelihood" if name == "choice" else "generate_until"
    plain = getattr(HFLM, kind)

    def counting(self: Any, requests: Any, **options: Any) -> Any:
        asked.append(len(requests))
        return plain(self, requests, **options)

    monkeypatch.setattr(HFLM, kind, counting)
    undisturbed = ask(model, plan, name, tmp_path / "whole")
    heard: list[float] = []

    def stop(share: float) -> None:
        heard.append(share)
        if share > 0.5:
            raise Killed

    with pytest.raises(Killed):
        ask(model, plan, name, tmp_path / "part", tell=stop)
    resumed = ask(model, plan, name, tmp_path / "part")
    assert resumed == undisturbed
    assert asked[0] == asked[1] and asked[2] == asked[0] - len(heard)


def test_limit_takes_the_first_documents(plan: Plan, model: Any, tmp_path: Path) -> None:
    whole = ask(model, plan, "choice", tmp_path / "whole")
    part = ask(model, plan, "choice", tmp_path / "part", settings={"limit": 5})
    assert (part["num_documents"], part["num_documents_in_all"]) == (5, 12)
    assert set(part["doc_hashes"]) < set(whole["doc_hashes"])


def test_tasks_that_cannot_be_built(plan: Plan) -> None:
    task = plan.tasks["choice"]
    for change, said in (
        ({"dataset_path": "nobody/has-this-data-set", "dataset_kwargs": {}}, "data"),
        ({"no_such_field": 1}, "no_such_field"),
    ):
        broken = type(task)("choice", {**task.config, **change}, "")
        with pytest.raises(InputError) as error:
            build(broken)
        assert "evaluate.tasks: choice: " in message(error) and said in message(error)


def test_a_choice_longer_than_the_model(plan: Plan, model: Any, tmp_path: Path) -> None:
    short = {"max_length": 2}
    model._max_length = 2
    try:
        with pytest.raises(InputError) as error:
            ask(model, plan, "choice", tmp_path / "answers", settings=short)
    finally:
        model._max_length = SETTINGS["max_length"]
    assert "does not fit into 2 tokens" in message(error)
