"""Benchmark tasks of a few documents, one of each kind of request."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice", "fewshot_split": "train", "doc_to_text": "{{text}}",
        "doc_to_choice": "{{endings}}", "doc_to_target": "{{label}}", "num_fewshot": 1,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "writes": {
        "output_type": "generate_until", "fewshot_split": "train", "doc_to_text": "Q: {{text}} A:",
        "doc_to_target": "#### {{label}}", "num_fewshot": 1,
        "generation_kwargs": {"until": ["Q:"], "do_sample": False, "max_gen_toks": 8},
        "filter_list": [
            {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern},
                                      {"function": "take_first"}]}
            for name, pattern in (("strict-match", r"#### (\w+)"), ("flexible-extract", r"(\w+)"))
        ],
        "metric_list": [{"metric": "exact_match"}],
    },
    "bits": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}  # fmt: skip


def make_tasks(folder: Path, num_documents: int = 12) -> dict[str, Path]:
    """Name -> task file, with data files beside it that it names by paths of its own folder."""
    generator = random.Random(0)
    words = ["import", "return", "value", "self", "index", "name", "list", "dict", "print"]

    def text() -> str:
        return " ".join(generator.choices(words, k=6))

    folder.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", 4), ("test", num_documents)):
        rows = [
            {"text": text(), "endings": [text() for _ in range(3)], "label": generator.randrange(3)}
            for _ in range(size)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    found = {}
    for name, own in TASKS.items():
        files = {"train": "train.jsonl", "test": "test.jsonl"}
        config = {"task": name, "dataset_path": "json", "test_split": "test", **own,
                  "dataset_kwargs": {"data_files": files}}  # fmt: skip
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(yaml.safe_dump(config), encoding="utf-8")
    return found
