"""What the driver asks of models and this machine before benchmark tasks are started."""

from __future__ import annotations

from importlib import metadata, util

from conf.schema import Config
from jobs.harness.plan import Plan
from jobs.harness.results import settings_of
from jobs.runs.models import Models
from sparsify.errors import InputError
from sparsify.models.load import load_tokenizer

_WRITES = ("max_gen_toks", "max_new_tokens", "max_tokens")

_WRITES_UNSAID = 256


def check_tasks(config: Config, models: Models, plan: Plan) -> None:
    """Require what tasks and options ask of the models and of this machine.

    Raises:
        InputError: no vLLM; no chat template; a task whose answers do not fit into the models.
    """
    options = config.evaluate
    if options.backend == "vllm":
        _require_vllm()
    if options.apply_chat_template and load_tokenizer(models.dense).chat_template is None:
        raise InputError(
            f"evaluate.apply_chat_template=true: the tokenizer of {models.dense} has no chat "
            "template; leave it out, or use a model that has one"
        )
    folders = [models.dense, *models.all_sparse().values()]
    length = settings_of(config, models.dense, folders)["max_length"]
    for task in plan.tasks.values():
        if task.config.get("output_type") != "generate_until":
            continue
        asked = task.config.get("generation_kwargs") or {}
        num_tokens = next((asked[key] for key in _WRITES if key in asked), _WRITES_UNSAID)
        if num_tokens >= length:
            raise InputError(
                f"evaluate.tasks: {task.name}: answers of up to {num_tokens} tokens leave no room "
                f"for the question in {length}; lower max_gen_toks in generation_kwargs of a task "
                "file of your own, or leave the task out"
            )


def _require_vllm() -> None:
    """Require vLLM where the harness finds it: as the package vllm, in this environment."""
    if util.find_spec("vllm") is None:
        raise InputError(
            "evaluate.backend=vllm: vLLM is not installed here; install it beside twofour "
            "(docs/evaluate.md#vllm), or leave evaluate.backend out"
        )
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        found = ", ".join(metadata.packages_distributions().get("vllm", ["a folder"]))
        raise InputError(
            f"evaluate.backend=vllm: it is installed as {found}, and lm-evaluation-harness looks "
            "for the package vllm; install that, or leave evaluate.backend out"
        ) from None
