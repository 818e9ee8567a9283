"""The table of models and tasks, from results that are made up, and what cards say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.harness.plan import OWN, Row, planned
from jobs.harness.results import Comparison, all_results, kept_path, result_key, result_path
from jobs.harness.words import card_results, labels, metric_of, name_of, partial, recovery_of
from jobs.runs.folder import write_json
from jobs.workers.export import tasks_part
from sparsify.errors import InputError
from tests.conftest import message

SETTINGS = {
    "backend": "hf", "dtype": "float32", "batch_size": 8, "max_length": 128, "adds_bos": False,
    "apply_chat_template": False, "limit": None, "lm_eval": "0.4.13",
}  # fmt: skip


def result(task: str, values: dict[str, list[float]], **facts: Any) -> dict[str, Any]:
    size = len(next(iter(values.values())))
    metrics = {
        key: {"score": float(np.mean(of_key)), "stderr": 0.1, "higher_is_better": True,
              "link": "mean", "values": of_key, "denominators": None}
        for key, of_key in values.items()
    }  # fmt: skip
    return {
        "task": task, "num_fewshot": 5, "num_documents": size, "num_documents_in_all": size,
        "dataset": ["json", None], "doc_hashes": [str(n) for n in range(size)],
        "metrics": metrics, **facts,
    }  # fmt: skip


def made_up(name: str, seed: int) -> dict[str, dict[str, Any]]:
    """Results of every task of a preset, of 3 to 8 documents each: twins of the real ones."""
    generator = np.random.default_rng(seed)
    plan = planned([name], None, False)
    found = {}
    for row in plan.rows:
        for place, task in enumerate(row.tasks):
            size = 3 + place % 6
            found[task] = result(
                task,
                {key: generator.integers(2, size=size).tolist() for key in row.metrics},
                num_fewshot=plan.num_fewshot[task],
            )
    return found


def mean_of(results: dict[str, Any], task: str, key: str) -> float:
    return float(np.mean(results[task]["metrics"][key]["values"]))


def test_first_leaderboard_is_the_plain_mean_of_six_and_of_57_subjects() -> None:
    name = "open-llm-leaderboard-v1"
    records = {"dense": made_up(name, 0), "sparse": made_up(name, 1)}
    plan = planned([name], None, False)
    table = Comparison(records, 0).table(plan.rows)
    assert [row["name"] for row in table] == [
        "ARC-Challenge", "MMLU", "HellaSwag", "WinoGrande", "GSM8K", "TruthfulQA", "mean",
    ]  # fmt: skip
    for place, (model, results) in enumerate(records.items()):
        subjects = [mean_of(results, task, "acc,none") for task in plan.rows[1].tasks]
        assert len(subjects) == 57
        expected = [
            mean_of(results, "arc_challenge", "acc_norm,none"),
            sum(subjects) / 57,
            mean_of(results, "hellaswag", "acc_norm,none"),
            mean_of(results, "winogrande", "acc,none"),
            mean_of(results, "gsm8k", "exact_match,strict-match"),
            mean_of(results, "truthfulqa_mc2", "acc,none"),
        ]
        found = [row["scores"][place]["score"] for row in table]
        assert found == pytest.approx([*expected, sum(expected) / 6])
        assert table[-1]["scores"][place]["model"] == model
    assert [row["num_fewshot"] for row in table] == [25, 5, 10, 5, 5, 0, None]


def test_second_leaderboard_is_normalised_task_by_task() -> None:
    name = "open-llm-leaderboard-v2"
    results = made_up(name, 2)
    rows = planned([name], None, False).rows
    table = Comparison({"dense": results}, 0).table(rows)
    scores = {row["name"]: row["scores"][0]["score"] for row in table}

    def normalised(task: str, key: str, lowest: float) -> float:
        return max(0.0, (mean_of(results, task, key) - lowest) / (1 - lowest))

    ifeval = [mean_of(results, "leaderboard_ifeval", key) for key in rows[0].metrics]
    assert scores["IFEval"] == pytest.approx(sum(ifeval) / 2)
    gpqa = [normalised(task, "acc_norm,none", 1 / 4) for task in rows[3].tasks]
    assert scores["GPQA"] == pytest.approx(sum(gpqa) / 3)
    bounds = {"murder_mysteries": 1 / 2, "object_placements": 1 / 5, "team_allocation": 1 / 3}
    musr = [
        normalised(f"leaderboard_musr_{task}", "acc_norm,none", bound)
        for task, bound in bounds.items()
    ]
    assert scores["MuSR"] == pytest.approx(sum(musr) / 3)
    assert scores["MMLU-Pro"] == pytest.approx(normalised("leaderboard_mmlu_pro", "acc,none", 0.1))
    six = [scores[row.name] for row in rows]
    assert scores["mean"] == pytest.approx(sum(six) / 6)
    assert all(row["is_normalised"] for row in table[:-1])


def test_a_group_by_size_and_rows_without_a_mean() -> None:
    records = {
        "dense": {"a": result("a", {"acc,none": [1, 1, 0]}), "b": result("b", {"acc,none": [1]})}
    }
    rows = [Row(OWN, "ab", ("a", "b"), ("acc",), by_size=True)]
    (row,) = Comparison(records, 0).table(rows)
    assert row["scores"][0]["score"] == pytest.approx(3 / 4)
    assert row["scores"][0]["recovery"] is None, "nothing to compare the dense model with"


def sample() -> dict[str, Any]:
    """A summary's part: a task that loses clearly, one inside the noise, one where lower is better.

    The made-up perplexity is part of no mean."""
    lines = [-2.0, -3.0, -1.0, -2.0] * 10
    perplexity = {"higher_is_better": False, "link": "exp", "score": float(np.exp(2)),
                  "values": lines, "stderr": None, "denominators": None}  # fmt: skip
    worse = {**perplexity, "values": [2 * line for line in lines], "score": float(np.exp(4))}
    records: dict[str, Any] = {"dense": {}, "recovered": {}}
    for model, of_perplexity, wrong in (("dense", perplexity, 0), ("recovered", worse, 12)):
        records[model] = {
            "clear": result("clear", {"acc,none": [0.0] * wrong + [1.0] * (40 - wrong)}),
            "noise": result("noise", {"acc,none": [wrong > 0, wrong == 0, *[1.0] * 38]}),
            "text": {**result("text", {"x,none": lines}), "metrics": {"ppl,none": of_perplexity}},
        }
    rows = [Row(OWN, name, (name,)) for name in ("clear", "noise", "text")]
    return {"settings": SETTINGS, "rows": Comparison(records, 0).table(rows)}


def test_what_is_noise_and_what_is_not() -> None:
    clear, noise, text, mean = sample()["rows"]
    (_, of_clear), (_, of_noise), (_, of_text) = (row["scores"] for row in (clear, noise, text))
    assert of_clear["recovery"] == pytest.approx(0.7) and of_clear["is_noise"] is False
    assert of_clear["recovery_low"] < 0.7 < of_clear["recovery_high"] < 1
    assert of_noise["recovery"] == 1.0 and of_noise["is_noise"] is True
    assert of_text["recovery"] == pytest.approx(np.exp(-2)), "lower is better"
    assert mean["is_mean"] and mean["scores"][0]["score"] == pytest.approx((1 + 39 / 40) / 2)
    assert recovery_of(of_noise, False) == "100.0 ≈" and "[" in recovery_of(of_clear)
    assert (name_of(clear), metric_of(text)) == ("clear (5-shot)", "ppl (lower is better)")


def test_models_that_were_asked_different_documents() -> None:
    one, other = result("a", {"acc,none": [1.0, 0.0]}), result("a", {"acc,none": [1.0, 0.0]})
    other["doc_hashes"] = ["x", "y"]
    with pytest.raises(InputError) as error:
        Comparison({"dense": {"a": one}, "sparse": {"a": other}}, 0)
    assert "different documents" in message(error)


def test_a_metric_that_the_task_has_not_got() -> None:
    records = {"dense": {"a": result("a", {"acc,none": [1.0]})}}
    with pytest.raises(InputError) as error:
        Comparison(records, 0).table([Row(OWN, "a", ("a",), ("f1",))])
    assert "has no metric f1; it has acc,none" in message(error)


def test_results_are_found_by_what_decided_them(tmp_path: Path) -> None:
    key = result_key(model="m", task="t", settings=SETTINGS)
    assert key != result_key(model="m", task="t", settings={**SETTINGS, "limit": 4})
    shown, kept = result_path(tmp_path, "recovered", "group::a/b"), kept_path(tmp_path, "other")
    for path, name in ((shown, key), (kept, "other")):
        path.parent.mkdir(parents=True)
        write_json(path, {"key": name})
    places = [tmp_path / "nothing", tmp_path]
    assert all_results(places) == {key: {"key": key}, "other": {"key": "other"}}
    shown.write_text('{"key": ', encoding="utf-8")
    with pytest.raises(InputError, match="damaged, not JSON"):
        all_results(places)


def test_cards_have_the_form_that_the_hub_reads() -> None:
    from huggingface_hub import ModelCard

    front, lines = tasks_part(sample(), "recovered", "sparse")
    card = ModelCard(f"---\nlibrary_name: transformers\n{front}---\n# A model\n")
    found = card.data.eval_results
    assert [one.dataset_name for one in found] == ["clear", "noise", "text"]
    assert [one.metric_type for one in found] == ["acc", "acc", "ppl"]
    assert found[0].metric_value == pytest.approx(0.7)
    assert found[0].dataset_args == {"num_few_shot": 5}
    assert any(
        line.startswith("| clear (5-shot) | acc | 1.0000 | 0.7000 | 70.0 [") for line in lines
    )
    assert tasks_part(None, "recovered", "sparse") == ("", [])
    assert card_results(sample(), "another") == ([], [])


def test_partial_scores_say_so_everywhere() -> None:
    part = sample()
    part["settings"] = {**SETTINGS, "limit": 16}
    assert partial(part) == "Partial: the first 16 documents of each task alone."
    results, _ = card_results(part, "recovered")
    assert all("Partial" in one["dataset"]["name"] for one in results)
    assert partial(part) in tasks_part(part, "recovered", "sparse")[1]
    assert labels({"tasks": part, "results": []}) == {"dense": "dense", "recovered": "recovered"}
