"""A tokenizer does what its own tokenizer.json says, whatever family the model claims to be of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config

from sparsify.errors import InputError
from sparsify.models.load import check_vocabulary, load_tokenizer, read_tokenizer
from sparsify.models.tokenizer import beyond_embedding

TEXT = "The lazy dog  runs over 12345 Straßen\n\tand it's 你好"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A tokenizer of Llama's kind (spaces become part of words) in a folder that says qwen2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["The quick brown fox jumps over the lazy dog and runs", "12345 Straßen it's"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(words * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    Qwen2Config().save_pretrained(tmp_path)
    return tmp_path


def test_the_files_own_rules_are_used(foreign: Path, tmp_path: Path) -> None:
    right = Tokenizer.from_file(str(foreign / "tokenizer.json"))
    expected = right.encode(TEXT, add_special_tokens=False).ids
    family = AutoTokenizer.from_pretrained(foreign)
    assert family(TEXT)["input_ids"] != expected  # what makes it necessary
    tokenizer, said = read_tokenizer(foreign)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert said is not None and "Qwen2Tokenizer" in said and "\n" not in said
    # What is written beside a model made from it is read the same way again.
    copy = tmp_path / "copy"
    tokenizer.save_pretrained(copy)
    Qwen2Config().save_pretrained(copy)
    assert load_tokenizer(copy)(TEXT, add_special_tokens=False)["input_ids"] == expected


def test_nothing_is_said_where_both_agree(tiny_model_dir: Path) -> None:
    tokenizer, said = read_tokenizer(tiny_model_dir)
    assert said is None
    right = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    assert tokenizer(TEXT)["input_ids"] == right.encode(TEXT).ids


@pytest.mark.parametrize("token", ["<image>", None])
def test_added_tokens_may_lie_beyond_the_embedding_and_words_may_not(
    tiny_model_dir: Path, token: str | None
) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    num_rows = model.config.vocab_size
    if token is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
        check_vocabulary(model, tokenizer, "given")
        assert beyond_embedding(tokenizer, num_rows) == {token: num_rows}
        tokenizer.eos_token = token  # put between documents, whatever they hold
    else:
        small = LlamaConfig(
            vocab_size=num_rows - 1, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )  # fmt: skip
        model = LlamaForCausalLM(small)
    with pytest.raises(InputError, match="embedding rows; use the tokenizer"):
        check_vocabulary(model, tokenizer, "given")
