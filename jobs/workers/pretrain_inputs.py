"""What a model from scratch is made of, looked at before anything is started: sizes, tokenizer."""

from __future__ import annotations

import tempfile
from copy import copy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase

from conf.options.pretrain import USUAL_VOCABULARY, PretrainConfig
from conf.schema import Config
from jobs.planning import preflight
from jobs.runs.hub import model_folder
from jobs.training.inputs import checked_store, given_digests, given_store
from sparsify.costs.flops import count_flops, distillation_flops
from sparsify.data.rows import tokenizer_digest
from sparsify.errors import InputError
from sparsify.files import file_sha256
from sparsify.models.lm_head import find_head
from sparsify.models.load import (
    check_sequence_length,
    check_vocabulary,
    has_tokenizer,
    load_tokenizer,
    model_of,
    read_config,
)


def config_folder(settings: PretrainConfig) -> Path | None:
    """The folder that says the model's sizes; None where options do."""
    if settings.config is None:
        return None
    return model_folder("pretrain.config", settings.config, fetch=False)


def tokenizer_folder(settings: PretrainConfig) -> Path | None:
    """The folder of the tokenizer; None where one is to be trained.

    Raises:
        InputError: pretrain.tokenizer names a folder without one.
    """
    if settings.tokenizer is not None:
        folder = model_folder("pretrain.tokenizer", settings.tokenizer, fetch=False)
        load_tokenizer(folder)
        return folder
    folder_ = config_folder(settings)
    return folder_ if folder_ is not None and has_tokenizer(folder_) else None


def given_tokenizer(settings: PretrainConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that is there already; None where one is to be trained."""
    folder = tokenizer_folder(settings)
    return None if folder is None else load_tokenizer(folder)


def config_of(
    settings: PretrainConfig, sequence_length: int, tokenizer: PreTrainedTokenizerBase | None
) -> PretrainedConfig:
    """The configuration of the model to make.

    Args:
        settings: its sizes, or where they are.
        sequence_length: of the rows, and the longest context of a model of given sizes.
        tokenizer: whose marks it has; None: one that is to be trained, whose only mark is id 0.

    Raises:
        InputError: see `read_config`.
    """
    folder = config_folder(settings)
    if folder is not None:
        return read_config(folder)
    known = USUAL_VOCABULARY if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    return LlamaConfig(
        vocab_size=settings.vocab_size or known,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=settings.tie_embeddings,
        bos_token_id=0 if tokenizer is None else tokenizer.bos_token_id,
        eos_token_id=0 if tokenizer is None else tokenizer.eos_token_id,
    )


def place_of(settings: PretrainConfig) -> str:
    """What messages call the model's configuration."""
    return "pretrain" if settings.config is None else f"{config_folder(settings)}/config.json"


def shapes_of(config: Config) -> Any:
    """The model without its weights; InputError as `config_of` and `model_of`."""
    settings = config.pretrain
    own = config_of(settings, config.data.sequence_length, given_tokenizer(settings))
    with torch.device("meta"):
        return model_of(own, place_of(settings))


def input_digests(config: Config) -> dict[str, str]:
    """For identities: the configuration, the tokenizer and a token store that were given."""
    settings = config.pretrain
    folder, tokenizer = config_folder(settings), given_tokenizer(settings)
    found = given_digests(config)
    if folder is not None:
        found["config"] = file_sha256(folder / "config.json")
    if tokenizer is not None:
        found["tokenizer"] = tokenizer_digest(tokenizer)
    return found


def check_pretrain(config: Config) -> None:
    """Hold sizes, tokenizer, rows and memory against each other.

    Raises:
        InputError: no config.json, or one of no causal language model; a tokenizer with more tokens
            than the model; rows longer than its context, or of another tokenizer; or see
            `preflight.check_recovery`.
    """
    settings = config.pretrain
    tokenizer, model = given_tokenizer(settings), shapes_of(config)
    find_head(model)
    check_sequence_length(model.config, config.data.sequence_length)
    if tokenizer is not None:
        _check_words(settings, model, tokenizer)
    folder = tokenizer_folder(settings)
    if given_store(config) is not None:
        if folder is None:
            raise InputError(
                f"data.train={config.data.train}: is a token store, and its tokenizer is not known "
                "here; say where it is with pretrain.tokenizer=FOLDER"
            )
        checked_store(config, folder)
    own = copy(config)
    own.distill = settings.training()
    with tempfile.TemporaryDirectory() as sizes:
        model.config.save_pretrained(sizes)
        try:
            preflight.check_recovery(own, Path(sizes), has_teacher=False)
        except InputError as error:
            raise InputError(str(error).replace("distill", "pretrain")) from None


def _check_words(settings: PretrainConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        check_vocabulary(model, tokenizer, place_of(settings))
    except InputError:
        num_rows, largest = model.config.get_text_config().vocab_size, len(tokenizer)
        where = f"pretrain.vocab_size={settings.vocab_size}"
        where = where if settings.config is None else f"pretrain.config={settings.config}"
        raise InputError(
            f"{where}: the model has {num_rows} tokens and the tokenizer of "
            f"{tokenizer_folder(settings)} {largest}; give a vocabulary of at least that, or "
            "another pretrain.tokenizer"
        ) from None


def describe_pretrain(config: Config) -> list[str]:
    """For the plan: the model, its tokenizer, the tokens and what they cost."""
    settings, model = config.pretrain, shapes_of(config)
    text, count = model.config.get_text_config(), sum(p.numel() for p in model.parameters())
    folder = tokenizer_folder(settings)
    words = "trained on the text" if folder is None else f"of {folder}"
    lines = [
        f"model: {type(model).__name__}, {count:,} parameters, {text.num_hidden_layers} blocks of "
        f"width {text.hidden_size}, random weights of seed {config.run.seed}",
        f"tokenizer: {words}, vocabulary {text.vocab_size:,}",
        f"tokens: {settings.num_tokens:,}, {settings.num_tokens / count:,.3g} for each parameter",
    ]
    try:
        counts = count_flops(model)
    except InputError as error:
        return [*lines, f"compute: not known ({error})"]
    length = config.data.sequence_length
    flops = distillation_flops(counts, None, [length]) / length * settings.num_tokens
    return [*lines, f"compute: at most {flops:.3g} FLOP"]
