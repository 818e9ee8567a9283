"""What a model from random weights is made of: sizes and tokenizer, and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.options.data import DataConfig
from conf.options.pretrain import PretrainConfig
from conf.schema import Config
from jobs.workers import pretrain, pretrain_inputs
from sparsify.data.rows import TokenRows
from sparsify.data.store_write import write_rows
from sparsify.errors import InputError
from sparsify.models.load import load_tokenizer
from tests.conftest import message


def config_of(length: int = 32, train: Path | None = None, **settings: Any) -> Config:
    data = DataConfig(sequence_length=length, train=None if train is None else str(train))
    return Config(
        stages=["pretrain"], data=data, pretrain=PretrainConfig(num_tokens=10**6, **settings)
    )


@pytest.fixture
def config_folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """config.json alone, without a tokenizer or weights."""
    folder = tmp_path / "config"
    folder.mkdir()
    shutil.copy(tiny_model_dir / "config.json", folder)
    return folder


def test_the_plan_says_the_model_and_what_it_costs(tiny_model_dir: Path) -> None:
    lines = pretrain_inputs.describe_pretrain(config_of())
    assert "4 blocks of width 128, random weights of seed 0" in lines[0]
    assert lines[1] == "tokenizer: trained on the text, vocabulary 1,024"
    assert "1,000,000, 1.38 for each parameter" in lines[2]
    assert lines[3].startswith("compute: at most 4.")
    words = max(load_tokenizer(tiny_model_dir).get_vocab().values()) + 1
    lines = pretrain_inputs.describe_pretrain(config_of(tokenizer=str(tiny_model_dir)))
    assert lines[1] == f"tokenizer: of {tiny_model_dir}, vocabulary {words:,}"


def test_a_configuration_brings_its_sizes_and_its_tokenizer(
    tiny_model_dir: Path, config_folder: Path
) -> None:
    for folder, tokenizer in ((tiny_model_dir, tiny_model_dir), (config_folder, None)):
        config = config_of(config=str(folder))
        pretrain_inputs.check_pretrain(config)
        assert pretrain_inputs.tokenizer_folder(config.pretrain) == tokenizer
        sizes = json.loads((folder / "config.json").read_text())
        assert pretrain_inputs.shapes_of(config).config.hidden_size == sizes["hidden_size"]


def test_what_holds_decides_the_identity_not_where_it_lies(
    tiny_model_dir: Path, config_folder: Path
) -> None:
    first = pretrain_inputs.input_digests(config_of(config=str(tiny_model_dir)))
    assert set(first) == {"config", "tokenizer"}
    alone = pretrain_inputs.input_digests(config_of(config=str(config_folder)))
    assert alone == {"config": first["config"]}
    path = config_folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"initializer_range": 0.5,', 1))
    assert pretrain_inputs.input_digests(config_of(config=str(config_folder))) != alone


def test_what_does_not_fit_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    store, tokenizer = tmp_path / "store", load_tokenizer(tiny_model_dir)
    write_rows(
        store, {"train": TokenRows.whole(torch.zeros(2, 32, dtype=torch.long))}, tokenizer, 32
    )
    for settings, said in (
        ({"config": str(tmp_path)}, "config.json is missing"),
        ({"tokenizer": str(tmp_path)}, "no tokenizer"),
        ({"tokenizer": "embedded", "vocab_size": 300},
         "pretrain.vocab_size=300: the model has 300 tokens and the tokenizer of"),
        ({"config": str(tiny_model_dir), "tokenizer": "embedded"},
         f"pretrain.config={tiny_model_dir}: the model has"),
        ({"config": str(tiny_model_dir), "length": 4096}, "data.sequence_length=4096: the model"),
        ({"train": store}, "is a token store, and its tokenizer is not known here"),
        ({"train": store, "tokenizer": "embedded"}, "tokenizer"),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            pretrain_inputs.check_pretrain(config_of(**settings))
        assert said in message(error)


def test_a_tokenizer_has_exactly_the_tokens_asked_for_or_the_text_is_too_little() -> None:
    def texts() -> Iterator[str]:
        return iter(["the cat sat on the mat"] * 3 + ["the dog sat on the log"] * 2)

    tokenizer = pretrain.train_tokenizer(texts(), 262, 32)
    assert len(tokenizer) == 262
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 32)
    assert tokenizer.decode(tokenizer("a cat, 7\n").input_ids) == "a cat, 7\n"
    again = pretrain.train_tokenizer(texts(), 262, 32)
    assert again.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(InputError) as error:
        pretrain.train_tokenizer(texts(), 5000, 32)
    assert "has a vocabulary of 5000 tokens, and the training text gives" in message(error)


def test_a_tokenizer_sees_every_source_and_no_held_out_document(tmp_path: Path) -> None:
    paths = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"text": f"{name} number {i}"}) for i in range(40)]
        path.write_text("\n".join(lines))
        paths.append(path)
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"text": "first number 7"}))
    data = DataConfig(mix=[f"0.5 {path}" for path in paths], heldout=str(heldout))
    found = list(pretrain.vocabulary_texts(data))
    assert len(found) == 79
    assert "first number 7" not in found
    assert list(pretrain.vocabulary_texts(data)) == found
