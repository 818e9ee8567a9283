"""The comparison of fine-tuned models: its task, its scorer, commands, figures and table."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import bench
from jobs.benchmarks import finetune
from jobs.benchmarks.support import answers, commands
from jobs.cli.compose import load_config
from sparsify.errors import InputError
from sparsify.models.load import load_model, load_tokenizer

EMBEDDED = commands.parse_model("embedded")


def options_of(*words: str) -> Namespace:
    return bench.parser().parse_args(["finetune", *words])


# --- the task


def test_records_are_sorted_letters_and_none_is_asked_that_was_learned() -> None:
    records = answers.make_records(4, 300, 50, seed=1)
    assert (len(records["train"]), len(records["heldout"])) == (300, 50)
    for record in records["train"] + records["heldout"]:
        letters = record["prompt"].removesuffix(" ->").split()
        assert len(set(letters)) == 4
        assert record["completion"].split() == sorted(letters)
    learned, asked = ({one["prompt"] for one in records[part]} for part in ("train", "heldout"))
    assert not learned & asked
    assert answers.make_records(4, 300, 50, seed=1) == records
    assert answers.make_records(4, 300, 50, seed=2) != records


@pytest.mark.parametrize(("letters", "said"), [(17, "--letters 17"), (2, "240 records")])
def test_a_task_that_cannot_be_made_is_refused(letters: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        answers.make_records(letters, 300, 50, seed=0)


# --- the scorer


def test_the_loss_is_that_of_answers_and_their_end(tmp_path: Path) -> None:
    model, tokenizer = load_model("embedded"), load_tokenizer("embedded")
    records = [
        {"prompt": "def f(", "completion": "self):"},
        {"prompt": "import os", "completion": ", sys"},
    ]
    losses: list[torch.Tensor] = []
    for record in records:
        whole = tokenizer(record["prompt"] + record["completion"])["input_ids"]
        ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
        begin = len(tokenizer(record["prompt"])["input_ids"])
        with torch.no_grad():
            log_probs = model(ids).logits[0, begin - 1 : -1].double().log_softmax(-1)
        losses.append(-log_probs.gather(1, ids[0, begin:, None]))
    answers.write_records(records, tmp_path / "asked.jsonl")
    found = answers.score_answers("embedded", tmp_path / "asked.jsonl")
    assert math.isclose(found["loss"], float(torch.cat(losses).mean()), rel_tol=1e-5)
    assert (found["exact_match"], found["num_records"]) == (0, 2)


class Oracle(torch.nn.Module):
    """Predicts the token that follows in the rows it was given, but for some."""

    def __init__(self, wrong: list[tuple[int, int]]) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(10.0))
        self.wrong = wrong

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Namespace:
        following = input_ids.roll(-1, dims=1)
        for row, place in self.wrong:
            following[row, place] = (following[row, place] + 1) % 8
        return Namespace(logits=self.scale * torch.nn.functional.one_hot(following, 8))


def test_one_wrong_token_of_an_answer_is_a_miss_and_others_do_not_count() -> None:
    from sparsify.data.examples import Example, pack

    is_answer = torch.tensor([False, False, True, True]).numpy()
    examples = [Example(torch.arange(i, i + 4).numpy(), is_answer) for i in range(3)]
    rows = pack(examples, 6, 0, together=False)
    right = answers._scored(Oracle([]), rows)
    assert (right[0], right[2]) == (3, 6)
    missed = answers._scored(Oracle([(1, 2)]), rows)
    assert missed[0] == 2
    assert math.isclose(missed[1] - right[1], 10.0, rel_tol=1e-4)
    # the prompt's own tokens, and what fills the row up
    assert answers._scored(Oracle([(0, 0), (2, 3), (2, 4)]), rows) == right


# --- the command


def test_every_side_is_a_command_that_can_be_read() -> None:
    options = options_of("--seeds", "3", "--letters", "5")
    found = finetune.planned(EMBEDDED, options, Path("out"))
    assert list(found) == ["pruned", *(f"{name}-3" for name in finetune._SIDES)]
    pruned = load_config("prune", found.pop("pruned")[1:])
    assert pruned.stages == ["prune", "distill", "evaluate"]
    adapters = {}
    for name, words in found.items():
        config = load_config("finetune", words[1:])
        assert config.run.seed == 3
        assert (config.run.from_ is None) == name.startswith("dense")
        is_full = config.finetune.adapter == "none"
        assert config.finetune.learning_rate == (options.rate if is_full else options.adapter_rate)
        adapters[name.removesuffix("-3")] = (config.finetune.adapter, config.finetune.merge)
    assert adapters["lora-at-merge"] == ("lora", "at_merge")
    assert adapters["qlora"] == ("qlora", "masked")


def test_there_is_a_dense_side(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--sides: dense"):
        finetune.run(options_of("--sides", "sparse", "--workdir", str(tmp_path)))


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Any]:
    options = options_of("--sides", "dense", "lora-masked", "--seeds", "0", "1")
    pruned = tmp_path / "embedded-pruned"
    pruned.mkdir()
    results = [{"name": name, "perplexity": 5.0} for name in ("dense", "recovered")]
    (pruned / "summary.json").write_text(json.dumps({"results": results}))
    exact = {pruned / "distill" / "model": 0.0, "embedded": 0.1}
    for name, seed, value in (
        ("dense", 0, 0.8), ("dense", 1, 0.5), ("lora-masked", 0, 0.4), ("lora-masked", 1, 0.5),
    ):  # fmt: skip
        run_dir = finetune.run_of(tmp_path, EMBEDDED, name, seed)
        exact[run_dir / "finetune" / "model"] = value
        metrics = {
            "num_tokens": 300, "tokens_per_s": 100.0, "gate": {"num_violations": 0},
            "adapter": {"cut_share": 0.0} if "lora" in name else None,
        }  # fmt: skip
        (run_dir / "finetune").mkdir(parents=True)
        (run_dir / "finetune" / "record.json").write_text(json.dumps({"metrics": metrics}))

    def score(folder: Path | str, records: Path) -> dict[str, float]:
        return {"exact_match": exact[folder], "loss": 1.0, "num_records": 10}

    asked = {seed: tmp_path / f"heldout-{seed}.jsonl" for seed in (0, 1)}
    return finetune.collect(EMBEDDED, options, tmp_path, asked, score)


def test_recovery_is_over_the_dense_model_of_the_same_seed(figures: dict[str, Any]) -> None:
    assert [row["recovery"] for row in figures["rows"]] == [1.0, 1.0, 0.5, 1.0]
    json.dumps(figures, allow_nan=False)
    text = finetune.markdown({"small": figures}, "python -m x")
    line = "| 2:4, LoRA masked | 45.0 % (40.0 to 50.0) | 1.000 | 75.0 % (50.0 to 100.0) | 0 | 0.0 %"
    assert line in text
    assert "| dense, before | 10.0 % |" in text


def test_without_a_right_answer_there_is_no_recovery() -> None:
    assert finetune.spread([None, 0.5], commands.percent) == ""
    assert finetune.spread([0.25], commands.percent) == "25.0 %"
