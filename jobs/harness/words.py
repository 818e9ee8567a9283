"""What is said of scores on benchmark tasks: in the terminal, on the page, in model cards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jobs.harness.plan import OWN

Tasks = dict[str, Any]
"""`tasks` of a summary"""

_CHANCE = "≈"
"""after a recovery whose difference is inside the noise"""

NOTE = (
    f"Recovery: share of the dense score, with its interval of 95 % by a paired bootstrap over "
    f"documents; {_CHANCE} difference inside the noise."
)


MISSING = "–"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def partial(tasks: Tasks) -> str:
    """What must be said of scores on a part of the documents; '' of whole ones."""
    limit = tasks["settings"].get("limit")
    if limit is None:
        return ""
    return f"Partial: the first {limit:,} documents of each task alone."


def manner(tasks: Tasks) -> str:
    """How the models were asked, a sentence."""
    settings = tasks["settings"]
    template = "with the chat template" if settings["apply_chat_template"] else "plain prompts"
    bos = "with" if settings["adds_bos"] else "without"
    return (
        f"lm-evaluation-harness {settings['lm_eval']}, {settings['backend']}, "
        f"{settings['dtype']}, {template}, {bos} BOS, at most "
        f"{settings['max_length']:,} tokens, batches of {settings['batch_size']}."
    )


def labels(summary: dict[str, Any]) -> dict[str, str]:
    """Model -> what people call it; those that have scores on tasks."""
    known = {row["name"]: row["label"] for row in summary.get("results") or []}
    first = summary["tasks"]["rows"][0]["scores"]
    return {one["model"]: known.get(one["model"], one["model"]) for one in first}


def name_of(row: dict[str, Any]) -> str:
    """What a row is called: the task, with how many examples, or the mean."""
    if row["is_mean"]:
        return "mean" if row["section"] == OWN else f"mean of {row['section']}"
    shots = "" if row["num_fewshot"] is None else f" ({row['num_fewshot']}-shot)"
    return f"{row['name']}{shots}"


def metric_of(row: dict[str, Any]) -> str:
    """Its metric without the filter that changes nothing, and whether lower is better."""
    text = str(row["metric"] or "").replace(",none", "")
    text += ", normalised" if row["is_normalised"] else ""
    return text if row["higher_is_better"] else f"{text} (lower is better)"


def score_of(entry: Mapping[str, Any]) -> str:
    """A score, as the harness writes it."""
    score = entry["score"]
    return f"{score:.4f}" if _is_number(score) else MISSING


def recovery_of(entry: Mapping[str, Any], with_interval: bool = True) -> str:
    """Recovery against the dense model in per cent, its interval, and whether it is noise."""
    if not _is_number(entry["recovery"]):
        return MISSING
    text = f"{100 * entry['recovery']:.1f}"
    if with_interval and _is_number(entry["recovery_low"]):
        text += f" [{100 * entry['recovery_low']:.1f}, {100 * entry['recovery_high']:.1f}]"
    return text + (f" {_CHANCE}" if entry["is_noise"] else "")


def card_results(
    tasks: Tasks | None, model: str
) -> tuple[list[dict[str, Any]], list[tuple[str, str, str, str, str]]]:
    """Scores of one model for its card.

    Args:
        tasks: of the summary.
        model: name of its result.

    Returns:
        `results` of a `model-index`, as the Hub reads them, and the rows of a table: task, metric,
        dense, this model, recovery; both empty without scores of the model.
    """
    found: list[dict[str, Any]] = []
    rows: list[tuple[str, str, str, str, str]] = []
    for row in (tasks or {}).get("rows", []):
        entry = next((one for one in row["scores"] if one["model"] == model), None)
        if entry is None:
            continue
        dense = next((one for one in row["scores"] if one["model"] == "dense"), {"score": None})
        rows.append(
            (name_of(row), metric_of(row), score_of(dense), score_of(entry), recovery_of(entry))
        )
        if not row["is_mean"] and _is_number(entry["score"]):
            assert tasks is not None
            metric = metric_of(row)
            said = f"{row['name']} {partial(tasks)}".strip()
            kind, value = str(row["metric"]).split(",")[0], round(entry["score"], 6)
            shots = {} if row["num_fewshot"] is None else {"num_few_shot": row["num_fewshot"]}
            found.append({
                "task": {"type": "text-generation", "name": "Text Generation"},
                "dataset": {"name": said, "type": row["dataset"] or row["name"], "args": shots},
                "metrics": [{"type": kind, "value": value, "name": metric}],
            })  # fmt: skip
    return found, rows
