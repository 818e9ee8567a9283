"""What the driver asks of a run's models before anything is started, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from cluster.machine import require_machine
from cluster.spec import ClusterSpec
from conf.schema import Config
from jobs.corpus.survey import source_state
from jobs.corpus.tokens import check_tokens, read_as_text
from jobs.planning import preflight
from jobs.runs.hub import has_weights
from jobs.runs.models import Models
from jobs.training.inputs import check_cache, checked_store
from sparsify.calibration.layers import prunable_linears
from sparsify.errors import InputError
from sparsify.evaluation.writing import num_positions
from sparsify.formats.kinds.compressed_tensors import check_family, check_fused, plan_of
from sparsify.formats.sparse_folder import model_name
from sparsify.models.blocks import stored_of
from sparsify.models.lm_head import find_head
from sparsify.models.load import (
    build_model,
    check_checkpoint,
    check_sequence_length,
    check_vocabulary,
    read_tokenizer,
)
from sparsify.packed.layout import Layer, Scheme, packed_layers
from sparsify.pattern import Pattern, check_divides
from sparsify.pruning.coverage import coverage
from sparsify.quantization.schemes import get_scheme


def check_cluster(spec: ClusterSpec) -> None:
    """Require the machines that can be counted from here.

    Raises:
        ClusterError: see `cluster.machine.require_machine`.
    """
    require_machine(spec, torch.cuda.device_count())


def check_inputs(config: Config, models: Models, fetch: bool = True) -> list[str]:
    """Require whole checkpoints, room for the rows, and a tokenizer that fits the text.

    Args:
        config: of the run.
        models: what it starts from.
        fetch: whether the weights of models of the Hub have been downloaded.

    Returns:
        What of the models is left out or is not as they say, in one line each.

    Raises:
        InputError: something the user can put right.
    """
    data, dense = config.data, models.dense
    sparse = models.all_sparse().values()
    present = [folder for folder in (dense, *sparse) if fetch or has_weights(folder)]
    for folder in present:
        check_checkpoint(folder)
    tokenizer, remark = read_tokenizer(dense)
    model = shapes_of(dense)
    check_sequence_length(model.config, data.sequence_length)
    check_vocabulary(model, tokenizer, str(dense))
    _check_prompt(config, model, tokenizer)
    for folder in sparse:
        check_same_words(folder, shapes_of(folder), dense, model)
    if "export" in config.stages and "compressed-tensors" in config.export.formats:
        check_compressed(config, models)
    num_rows = model.get_input_embeddings().weight.shape[0]
    for name, _ in read_as_text(data, "distill" in config.stages):
        source_state(name)
    said = check_tokens(data, "distill" in config.stages, tokenizer, dense, num_rows)
    left = coverage(model, config.prune.skip).remark() if "prune" in config.stages else None
    remarks = {dense: said + [text for text in (remark, left) if text is not None]}
    for folder in present:
        remarks.setdefault(folder, []).extend(stored_of(folder, config.model.dtype).remarks())
    return [
        f"model {model_name(folder)}: {text}" for folder, texts in remarks.items() for text in texts
    ]


def _check_prompt(config: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Require that what the models are to continue is a text, and leaves room to continue it."""
    prompt = config.evaluate.prompt
    if prompt is None or not {"evaluate", "quantize"}.intersection(config.stages):
        return
    num_tokens, limit = len(tokenizer(prompt)["input_ids"]), num_positions(model.config)
    if not 0 < num_tokens < limit:
        raise InputError(
            f"evaluate.prompt: has {num_tokens} tokens and the model {limit} positions; give a "
            "text that leaves room for evaluate.num_new_tokens"
        )


def check_same_words(folder: Path, model: Any, dense: Path, dense_model: Any) -> None:
    """Require that two models predict the same tokens: scores and recovery compare them."""
    widths = [one.config.get_text_config().vocab_size for one in (model, dense_model)]
    if widths[0] != widths[1]:
        raise InputError(
            f"model folder {folder}: has a vocabulary of {widths[0]} tokens and the dense model "
            f"{dense} {widths[1]}; say which model it was pruned from with model.teacher=FOLDER"
        )


def check_prune(config: Config, dense: Path) -> None:
    """Require that every layer to prune has whole groups of the pattern, and cards with room.

    Raises:
        InputError: a layer's inputs are no multiple of the group's length; or see
            `preflight.check_pruning`.
    """
    parsed = Pattern.parse(config.prune.pattern)
    for _, name, module in prunable_linears(shapes_of(dense), config.prune.skip):
        check_divides(name, module.in_features, parsed)
    preflight.check_pruning(config, dense)


def check_quantize(config: Config, dense: Path) -> None:
    """Require options that the scheme has, and globs that name layers.

    Raises:
        InputError: see `QuantScheme.check` and `prunable_linears`.
    """
    settings = config.quantize
    get_scheme(settings.scheme).check(settings)
    prunable_linears(shapes_of(dense), settings.skip, "quantize.skip")


def check_compressed(config: Config, models: Models) -> None:
    """Require that the quantised model, which is there or is to be made, can be written in the
    format compressed-tensors.

    Raises:
        InputError: see `kinds.compressed_tensors.plan_of`, `check_family` and `check_fused`.
    """
    model = shapes_of(models.dense)
    check_family(model)
    if "quantize" in config.stages:
        layers: Mapping[str, Layer] = _to_quantize(config, model)
    else:
        made = models.made.get("quantize")
        layers = packed_layers(made["packed"] if made else models.sparse("export"))
    plan_of(layers)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    check_fused({name for name, layer in layers.items() if layer.scheme.has_codes}, linears)


def _to_quantize(config: Config, model: Any) -> dict[str, Layer]:
    """What the stage quantize will make of each layer that is pruned."""
    pattern, settings = Pattern.parse(config.prune.pattern), config.quantize
    make = get_scheme(settings.scheme)
    found = {}
    for _, name, module in prunable_linears(model, config.prune.skip):
        is_left = any(fnmatchcase(name, glob) for glob in settings.skip)
        scheme = Scheme() if is_left else make.stored_as(settings, module.in_features)
        found[name] = Layer((module.out_features, module.in_features), scheme, pattern)
    return found


def check_distill(config: Config, dense: Path) -> None:
    """Require a family that recovery can train, inputs that fit this run, and cards with room.

    Raises:
        InputError: no base model before the head, or no linear head; stored rows or samples of
            something else; or see `preflight.check_recovery`.
    """
    find_head(shapes_of(dense))
    checked_store(config, dense)
    check_cache(config, dense)
    preflight.check_recovery(config, dense)


def shapes_of(folder: Path) -> Any:
    """A transformers model without its weights.

    Raises:
        InputError: see `sparsify.models.load.build_model`.
    """
    with torch.device("meta"):
        return build_model(folder)
