"""The run's text as tokens, looked at before anything is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conf.options.data import DataConfig
from jobs.corpus.tokens import check_tokens
from sparsify.errors import InputError
from sparsify.models.load import load_tokenizer


def text_file(path: Path, *more: str) -> str:
    texts = [f"Document {i}, in words and the number 12{i}." for i in range(40)]
    lines = [json.dumps({"text": text}) for text in (*texts, *more)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_tokens_beyond_the_embedding_that_no_text_holds(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    tokenizer = load_tokenizer(folder)
    num_rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<audio>"]})
    data = DataConfig(calibration=text_file(tmp_path / "a.jsonl"))
    (said,) = check_tokens(data, True, tokenizer, folder, num_rows)
    assert said.startswith("2 special tokens have ids beyond") and "'<image>'" in said
    assert check_tokens(data, True, tokenizer, folder, num_rows + 2) == []
    # Training text counts where it is read.
    data.train = text_file(tmp_path / "b.jsonl", "What is in <audio> here?")
    check_tokens(data, False, tokenizer, folder, num_rows)
    with pytest.raises(InputError, match=r"b\.jsonl: a document \('What is in <audio> here\?'\)"):
        check_tokens(data, True, tokenizer, folder, num_rows)


def test_text_that_transformers_cuts_in_its_own_way_is_refused(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    # A rule that the awkward texts do not show.
    tokenizer = load_tokenizer(tiny_model_dir)

    class FamilyTokenizer(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **options: object) -> object:
            return super().__call__(text.replace("number 12", "number 1 2"), **options)

    family = FamilyTokenizer.from_pretrained(tiny_model_dir)
    data = DataConfig(calibration=text_file(tmp_path / "a.jsonl"))
    wrong = r"FamilyTokenizer makes other ids of .*a\.jsonl than tokenizer\.json says"
    with pytest.raises(InputError, match=wrong):
        check_tokens(data, False, family, tiny_model_dir, len(tokenizer))
