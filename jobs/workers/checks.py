"""What the driver asks of a run's models and text before anything is started, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from cluster.machine import require_machine
from cluster.spec import ClusterSpec
from conf.schema import Config
from jobs.corpus.sources import source_fingerprint
from jobs.runs.hub import has_weights
from jobs.runs.models import Models
from sparsify.calibration.layers import prunable_linears
from sparsify.errors import InputError
from sparsify.models.lm_head import find_head
from sparsify.models.load import (
    build_model,
    check_checkpoint,
    check_sequence_length,
    check_vocabulary,
    load_tokenizer,
)
from sparsify.pattern import Pattern, check_divides


def check_cluster(spec: ClusterSpec) -> None:
    """Require the machines that can be counted from here.

    Raises:
        ClusterError: see `cluster.machine.require_machine`.
    """
    require_machine(spec, torch.cuda.device_count())


def check_inputs(config: Config, models: Models, fetch: bool = True) -> None:
    """Require whole checkpoints, room for the rows, a tokenizer that fits, and text to read.

    Args:
        config: of the run.
        models: what it starts from.
        fetch: whether the weights of models of the Hub have been downloaded.

    Raises:
        InputError: something the user can put right.
    """
    dense = models.dense
    sparse = models.all_sparse().values()
    for folder in (dense, *sparse):
        if fetch or has_weights(folder):
            check_checkpoint(folder)
    tokenizer = load_tokenizer(dense)
    model = shapes_of(dense)
    check_sequence_length(model.config, config.data.sequence_length)
    check_vocabulary(model, tokenizer, str(dense))
    for folder in sparse:
        _check_same_words(folder, shapes_of(folder), dense, model)
    source_fingerprint(config.data, "calibration")


def _check_same_words(
    folder: Path, model: PreTrainedModel, dense: Path, dense_model: PreTrainedModel
) -> None:
    """Require that two models predict the same tokens: scores and recovery compare them."""
    widths = [one.config.get_text_config().vocab_size for one in (model, dense_model)]
    if widths[0] != widths[1]:
        raise InputError(
            f"model folder {folder}: has a vocabulary of {widths[0]} tokens and the dense model "
            f"{dense} {widths[1]}; say which model it was pruned from with model.teacher=FOLDER"
        )


def check_pattern(dense: Path, pattern: str, skip: Sequence[str]) -> None:
    """Require that every layer to prune has whole groups of the pattern.

    Raises:
        InputError: a layer's inputs are no multiple of the group's length.
    """
    parsed = Pattern.parse(pattern)
    for _, name, module in prunable_linears(shapes_of(dense), skip):
        check_divides(name, module.in_features, parsed)


def check_recovery(dense: Path) -> None:
    """Require a family that recovery can train, as far as shapes tell.

    Raises:
        InputError: no base model before the head, or no linear head.
    """
    find_head(shapes_of(dense))


def shapes_of(folder: Path) -> PreTrainedModel:
    """A model without its weights.

    Raises:
        InputError: see `sparsify.models.load.build_model`.
    """
    with torch.device("meta"):
        return build_model(folder)
