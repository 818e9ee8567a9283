"""The only importer of lm-evaluation-harness: tasks built, asked of a model, and what came of it.

What is asked and how it is scored is the harness's own, as its command line does it: the same
prompts, seeds, truncation and metrics. It is called task by task, so that each one's result can be
kept when it is there.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.model import LM, CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import _import_func_in_yml

from jobs.harness.catalog import EXTRA
from jobs.harness.definitions import Function, Task
from sparsify.errors import InputError, first_line
from sparsify.evaluation.paired import LINKS, DocumentScores
from sparsify.models.load import load_model, load_tokenizer

_SEEDS = {"random": 0, "other": 1234}
"""of the harness's command line"""

_BOOTSTRAP = 100_000
"""resamples of the harness's own standard errors of metrics that have no formula; its default"""

_REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")

_CLOSE = 1e-9


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints progress bars and advice; a run has a display of its own."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(_nowhere()), contextlib.redirect_stderr(_nowhere()):
        yield


@cache
def _nowhere() -> TextIO:
    """Never closed: loggers that are set up meanwhile, as vLLM's, write to it ever after."""
    return open(os.devnull, "w", encoding="utf-8")


def build(task: Task) -> Any:
    """A task with its data, as the harness has it.

    Raises:
        InputError: it cannot be built: data that cannot be had, a package that is missing, a
            definition that the harness does not understand.
    """
    where = f"evaluate.tasks: {task.name}"
    try:
        with _quiet():
            config = _with_functions(task.config)
            built = TaskManager(include_defaults=False).load([config])["tasks"][task.name]
            list(itertools.islice(built.eval_docs, 1))
    except ModuleNotFoundError as error:
        raise InputError(f"{where}: needs the package {error.name}; {EXTRA}, or it alone") from None
    except ConnectionError as error:
        raise InputError(
            f"{where}: its data cannot be had ({first_line(error)}); fetch them once where there "
            "is a network, or give a task file with data_files of your own"
        ) from None
    except Exception as error:  # whatever the definition, its data or its code raise
        raise InputError(
            f"{where}: cannot be built ({type(error).__name__}: {first_line(error)})"
        ) from None
    return built


def _with_functions(value: Any) -> Any:
    """A definition with the Python that it names in place of the names."""
    if isinstance(value, Function):
        return _import_func_in_yml(value.name, Path(value.folder))
    if isinstance(value, dict):
        return {key: _with_functions(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_functions(one) for one in value]
    return value


def language_model(
    folder: Path, dense: Path, dtype: str, device: str, settings: dict[str, Any]
) -> LM:
    """A model as the harness asks it.

    Args:
        folder: of the model; packed ones are unpacked, or with vLLM served as they are.
        dense: whose tokenizer all models of a run share, and so the tokens before each prompt.
        dtype: of the weights.
        device: cpu or cuda.
        settings: see `jobs.harness.results.settings_of`.

    Raises:
        InputError: vLLM is asked for and not installed; or see `load_model`.
    """
    shared = {"batch_size": settings["batch_size"], "max_length": settings["max_length"]}
    if settings["backend"] == "vllm":
        _collect()  # its engine is another process, which counts on an empty card
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        with _quiet():
            return get_model("vllm")(
                pretrained=str(folder), tokenizer=str(dense), dtype=dtype, **shared
            )
    model, tokenizer = load_model(folder, dtype, device), load_tokenizer(dense)
    with _quiet():
        return HFLM(pretrained=model, tokenizer=tokenizer, **shared)


def release(model: LM) -> None:
    """Give the memory of a model of `language_model` back; nothing can be asked of it any more."""
    engine = getattr(getattr(model, "model", None), "llm_engine", None)
    if engine is not None:  # vLLM's, which would stay until somebody collects what is in cycles
        engine.engine_core.shutdown()
    _collect()


def _collect() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def run_task(
    model: LM, task: Task, num_fewshot: int | None, settings: dict[str, Any], answers: Path,
    progress: Callable[[float], None],
) -> dict[str, Any]:  # fmt: skip
    """Ask one task of a model.

    Args:
        model: of `language_model`.
        task: to be asked.
        num_fewshot: examples before each question; None: as the task says.
        settings: see `jobs.harness.results.settings_of`.
        answers: file that keeps each answer as it comes, of this model, task and settings alone;
            what is in it is not asked again.
        progress: told the share of the questions that are answered.

    Returns:
        The result as plain values; see `jobs.harness.results`.

    Raises:
        InputError: see `build`; a choice that is longer than the model's positions.
    """
    built = build(task)
    own = built.get_config("num_fewshot")
    if num_fewshot is None or own == 0:
        num_fewshot = own or 0
    built.set_config(key="num_fewshot", value=num_fewshot)
    built.set_fewshot_seed(seed=_SEEDS["other"])
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["other"])
    torch.manual_seed(_SEEDS["other"])
    try:
        with _quiet(), _answered(model, answers, progress) as asked:
            found = evaluate(
                lm=asked, task_dict={"tasks": {task.name: built}}, limit=settings["limit"],
                bootstrap_iters=_BOOTSTRAP, apply_chat_template=settings["apply_chat_template"],
                fewshot_as_multiturn=settings["apply_chat_template"], log_samples=True,
                confirm_run_unsafe_code=bool(task.config.get("unsafe_code")),
            )  # fmt: skip
    except AssertionError as error:  # the harness says nothing, or what a task has not got
        raise InputError(
            f"evaluate.tasks: {task.name}: a continuation does not fit into "
            f"{settings['max_length']} tokens, or the task lacks something ({first_line(error)})"
        ) from None
    assert found is not None, "one process"
    return _result(task.name, built, found, num_fewshot)


@contextlib.contextmanager
def _answered(model: LM, answers: Path, progress: Callable[[float], None]) -> Iterator[Any]:
    """The model behind a file of its answers, telling how far it is."""
    answers.parent.mkdir(parents=True, exist_ok=True)
    caching = CachingLM(model, str(answers))
    hook, place = model.cache_hook, [0, 1]

    class Telling:
        """Keeps an answer, and counts it."""

        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            hook.add_partial(kind, request, answer)
            place[0] += 1
            progress(min(1.0, place[0] / place[1]))

    def counted(ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(requests: Sequence[Any]) -> Any:
            place[:] = [0, len(requests)]
            return ask(requests)

        return asked

    model.set_cache_hook(Telling())
    for kind in _REQUESTS:
        setattr(model, kind, counted(getattr(model, kind)))
    try:
        yield caching
    finally:
        for kind in _REQUESTS:
            delattr(model, kind)  # the class's own again
        caching.dbdict.close()


def _result(name: str, built: Any, found: Any, num_fewshot: int) -> dict[str, Any]:
    """What the harness found, with every document's part in each metric."""
    rows, scores = found["samples"][name], found["results"][name]
    better = found["higher_is_better"][name]
    first = rows[0]["filter"]
    documents = sorted(
        (row["doc_hash"], row["doc_id"]) for row in rows if row["filter"] == first
    )  # the same order for every model
    metrics: dict[str, Any] = {}
    for key, score in scores.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        of_document = {row["doc_id"]: row.get(metric) for row in rows if row["filter"] == chosen}
        values = [of_document.get(number) for _, number in documents]
        stderr = scores.get(f"{metric}_stderr,{chosen}")
        metrics[key] = {
            "score": _finite(score),
            "stderr": _finite(stderr),
            "higher_is_better": bool(better.get(metric, True)),
            **_parts(values, score),
        }
    return {
        "task": name,
        "num_fewshot": num_fewshot,
        "num_documents": len(documents),
        "num_documents_in_all": len(built.eval_docs),
        "version": str(found["versions"].get(name)),
        "dataset": [built.config.dataset_path, built.config.dataset_name],
        "metrics": metrics,
        "doc_hashes": [digest for digest, _ in documents],
    }


def _finite(value: Any) -> float | None:
    """A number that JSON can hold; the harness says 'N/A' where it has none."""
    is_number = isinstance(value, int | float | np.number) and math.isfinite(value)
    return float(value) if is_number else None


def _parts(values: list[Any], score: Any) -> dict[str, Any]:
    """`DocumentScores` of a metric, by what gives the harness's score; nulls where nothing does."""
    try:
        pairs = np.array([_pair(value) for value in values], dtype=np.float64)
    except (TypeError, ValueError):
        pairs = np.empty((0, 2))
    for link in LINKS if len(pairs) and np.isfinite(pairs).all() else ():
        parts = DocumentScores(pairs[:, 0], pairs[:, 1], link)
        if math.isclose(parts.score, float(score), rel_tol=_CLOSE, abs_tol=_CLOSE):
            is_plain = bool((pairs[:, 1] == 1).all())
            denominators = None if is_plain else pairs[:, 1].tolist()
            return {"link": link, "values": pairs[:, 0].tolist(), "denominators": denominators}
    return {"link": None, "values": None, "denominators": None}


def _pair(value: Any) -> tuple[float, float]:
    """Numerator and denominator of a document: a number, right ones of several, or (sum, size)."""
    if isinstance(value, list) and all(isinstance(one, bool | np.bool_) for one in value):
        return float(sum(value)), float(len(value))
    if isinstance(value, tuple | list):
        above, below = value
        return float(above), float(below)
    return float(value), 1.0
