"""What is wrong with the text is said before the first stage, for all stages of a command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf.options.data import DataConfig
from conf.options.distill import DistillConfig
from conf.options.evaluate import EvaluateConfig
from conf.options.prune import PruneConfig
from conf.schema import Config
from jobs.corpus import survey
from jobs.corpus.survey import Texts
from jobs.runs.models import Models
from jobs.training.heldout import write_heldout
from jobs.workers import evaluate
from jobs.workers.text_checks import check_texts
from sparsify.data.split import is_held_out
from sparsify.errors import CalibrationError, InputError
from sparsify.models.load import load_tokenizer
from tests.conftest import message

STORIES = [f"Story {i}: " + "the cat sat on the mat. " * 20 for i in range(80)]


def write(path: Path, texts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(path: Path, *stages: str, **data: Any) -> Config:
    return Config(
        stages=list(stages), prune=PruneConfig(num_samples=8),
        data=DataConfig(calibration=str(path), sequence_length=32, **data),
        evaluate=EvaluateConfig(num_tokens=64),
    )  # fmt: skip


@pytest.fixture
def check(tiny_model_dir: Path):
    """The checks of a config; what they say."""

    def run(config: Config) -> list[str]:
        said: list[str] = []
        check_texts(config, Models(tiny_model_dir, ()), said.append)
        return said

    return run


def test_what_is_left_out_is_said_once(tmp_path: Path, check) -> None:
    path = write(tmp_path / "a.jsonl", [*STORIES, None, "", "half \ud800"])
    assert check(config(path, "prune", "distill", "evaluate")) == [
        f"warning: data.calibration={path}: rows without text (null or empty), passed over: 2 "
        "(a.jsonl, line 81, a.jsonl, line 82)",
        f"warning: data.calibration={path}: rows with half of a surrogate pair, read as U+FFFD: 1 "
        "(a.jsonl, line 83)",
    ]


@pytest.mark.parametrize("bad", [7, ["a"], {}])
def test_a_row_that_no_stage_may_come_to_is_found(tmp_path: Path, check, bad: Any) -> None:
    path = write(tmp_path / "a.jsonl", [*STORIES, bad])
    with pytest.raises(InputError, match="line 81: field 'text' is"):
        check(config(path, "prune"))
    good = write(tmp_path / "b.jsonl", STORIES)
    with pytest.raises(InputError, match="line 81: field 'text' is"):
        check(config(good, "prune", "evaluate", heldout=str(path)))


def test_nothing_is_held_out(tmp_path: Path, check) -> None:
    path = write(tmp_path / "a.jsonl", [s for s in STORIES if not is_held_out(s, 0.05)])
    check(config(path, "prune"))
    with pytest.raises(InputError) as error:
        check(config(path, "prune", "evaluate"))
    text = message(error)
    assert f"data.calibration={path}: the held-out part has 0 tokens" in text
    assert "a larger data.heldout_share, or other text with data.heldout=FILE" in text
    recovery = DistillConfig(heldout_every_steps=5)
    given = config(path, "prune", "distill")
    with pytest.raises(InputError, match="the held-out part has 0 tokens"):
        check(Config(given.stages, data=given.data, prune=given.prune, distill=recovery))


def test_held_out_text_of_which_nothing_can_be_scored(tmp_path: Path, check) -> None:
    path = write(tmp_path / "a.jsonl", STORIES)
    letters = write(tmp_path / "b.jsonl", ["\n"] * 40 + ["a"] * 40)
    given = config(path, "prune", "evaluate", heldout=str(letters))
    check(given)  # a letter and its mark: one prediction
    short = write(tmp_path / "c.jsonl", ["a"] * 9)
    with pytest.raises(InputError, match=r"data.heldout=.*it has 18 tokens; 2 rows of 32 need 64"):
        check(config(path, "prune", "evaluate", heldout=str(short)))


def test_calibration_for_the_stage_that_asks_for_more(tmp_path: Path, check) -> None:
    path = write(tmp_path / "a.jsonl", STORIES[:4])
    check(config(path, "prune"))
    with pytest.raises(CalibrationError, match="256 rows of 32 need"):
        check(config(path, "prune", "quantize"))


def test_a_source_is_looked_at_once_until_its_files_change(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "a.jsonl", STORIES)
    looked: list[str] = []
    whole = survey.survey_source
    monkeypatch.setattr(
        survey, "survey_source", lambda *given: looked.append(given[1]) or whole(*given)
    )
    texts = Texts(DataConfig(calibration=str(path)))
    prints = [texts.fingerprint(which) for which in ("calibration", "train", "heldout")]
    assert len(set(prints)) == len(looked) == 1
    write(path, STORIES[:-1])
    assert texts.fingerprint("train") not in prints


def test_scores_on_less_text_than_was_asked_for_say_so(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", STORIES)
    given = config(path, "prune", "evaluate", heldout_share=0.2)
    given.evaluate.num_tokens = 100_000
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    loaded: list[Path] = []
    for name in ("load_pair", "load_model"):
        true = getattr(evaluate, name)
        monkeypatch.setattr(
            evaluate, name, lambda *given, true=true: loaded.append(given[0]) or true(*given)
        )
    said: list[str] = []
    told: list[tuple[int, int]] = []
    worker: Any = SimpleNamespace(
        num_threads=1, device="cpu", warn=said.append, progress=lambda *how: told.append(how)
    )
    folders = [tiny_model_dir, copy, copy]
    parts = [
        evaluate.score_share(
            worker,
            {"config": given, "dense": tiny_model_dir, "folders": folders, "share": share,
             "shares": 2},
        )
        for share in (0, 1)
    ]  # fmt: skip
    assert loaded == [tiny_model_dir, copy, copy] * 2, "the dense model once for all"
    assert told == [(1, 3), (2, 3), (3, 3)] * 2
    assert all(part["writing"] is None for part in parts[1]), "one share writes for all"
    itself, other, again = (evaluate.total(of_model) for of_model in zip(*parts, strict=True))
    assert itself == other == again, "its own forward serves the dense model twice"
    assert itself["kl"] == 0 and itself["top1_agreement"] == 1
    writing = itself["writing"]
    assert writing["text"] and writing["prompt"].startswith("Story")
    assert {key: writing[key] for key in ("num_tokens", "temperature", "seed")} == {
        "num_tokens": 48, "temperature": 0.7, "seed": given.run.seed,
    }  # fmt: skip
    (line,) = said
    assert "rows of 32 tokens, 3125 were asked for; all of them are used" in line


def test_held_out_rows_of_a_recovery_that_are_fewer_or_left_out(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    path = write(tmp_path / "a.jsonl", STORIES)
    given = config(path, "prune", "distill", heldout_share=0.2)
    lines = write_heldout(given, load_tokenizer(tiny_model_dir), tmp_path / "heldout")
    assert "512 were asked for; all of them are used" in lines[0]
    given = Config(given.stages, data=given.data, distill=DistillConfig(heldout_tokens=5 * 32))
    (line,) = write_heldout(given, load_tokenizer(tiny_model_dir), tmp_path / "odd")
    assert line.startswith("distill: 1 of the 5 held-out rows of heldout are not scored")
