"""Checkpoint folders in the Hugging Face layout: check them, read them, write them.

Owns what a usable model folder is and says in one line why another one is not. Safetensors only
(no pickle), no code from a checkpoint, no network: a model is a folder on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.utils import logging

from sparsify.errors import InputError, first_line
from sparsify.files import readable, resolve_path
from sparsify.models.foreign import KEYS, ForeignFolder, find_config
from sparsify.models.layout import layout_of
from sparsify.models.stored import (
    Place,
    follow_weights,
    not_finite,
    num_not_finite,
    packed_places,
    places_in,
)
from sparsify.models.tokenizer import beyond_embedding, by_own_rules
from sparsify.models.unfuse import unfuse_experts
from sparsify.packed.folder import PackedFolder, open_packed
from sparsify.packed.layout import Contents, is_packed_config

if TYPE_CHECKING:  # 3.4 s, for which nothing here asks before a model is loaded
    from transformers import PreTrainedModel


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_WEIGHTS = "model.safetensors"

GENERATION = "generation_config.json"

INDEX = "model.safetensors.index.json"

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "*.tiktoken",
)  # fmt: skip

_LFS_START = b"version https://git-lfs"


def check_checkpoint(path: str | Path) -> None:
    """Check that `path` is a model folder that can be loaded, without reading the weights.

    A packed folder is one like any other, and so is one of `models.foreign`: what reads it finds
    dense weights.

    Raises:
        InputError: no such folder; config.json missing, not JSON, of an unknown, non-causal or
            quantised model, or asking for code from the checkpoint; no safetensors; a shard that
            is missing, truncated or corrupt; see also `packed.folder.PackedFolder`.

    Cost: reads config.json, the index and the header of every shard.
    """
    folder = resolve_path(path)
    with readable(f"model folder {path}"):
        if not folder.is_dir():
            found = "is a file, not a folder" if folder.exists() else "there is no such folder"
            raise InputError(
                f"model folder {path}: {found}; give a folder with config.json and safetensors, or "
                "a model of the Hugging Face Hub as ORGANISATION/NAME"
            )
        read_config(folder)
        if open_packed(folder) is None:
            for shard in weight_files(folder):
                _check_shard(shard)
            open_encoded(folder)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # bad JSON and bad UTF-8
        raise InputError(
            f"{path}: not valid JSON ({first_line(error)}); copy or download the file again"
        ) from None


def read_config(folder: Path) -> PretrainedConfig:
    """The model's configuration; InputError unless it is a causal LM of a known type."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"model folder {folder}: config.json is missing; give a folder in the Hugging Face "
            "layout (config.json, model.safetensors, tokenizer.json)"
        )
    raw = _read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise InputError(f"{path}: no 'model_type' in it; this is not a model's configuration")
    model_type = raw["model_type"]
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise InputError(
                f"{path}: model_type {model_type!r} needs Python code from the checkpoint "
                "(auto_map), which is refused; use a model whose type transformers has built in"
            )
        raise InputError(
            f"{path}: model_type {model_type!r} is not known to the installed transformers; use a "
            "model of a known type or a newer transformers"
        )
    is_packed = is_packed_config(raw)
    if is_packed:
        Contents.from_dict(raw["quantization_config"], str(path))
    elif find_config(raw, str(path)) is None and raw.get("quantization_config"):
        raise InputError(
            f"{path}: the weights are quantised (quantization_config); pruning and recovery need "
            "the original model in float32, bfloat16 or float16"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path}: not a usable configuration: {first_line(error)}") from None
    for key in KEYS:
        if hasattr(config, key):
            delattr(config, key)  # whoever asks here gets the weights unpacked
    if not _is_decoder_only(config):
        raise InputError(
            f"{path}: model_type {model_type!r} is no causal language model; use a decoder-only "
            "text model"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{path}: model_type {model_type!r} is an encoder and a decoder; use a decoder-only "
            "text model"
        )
    return config


def build_model(folder: Path, dtype: str | None = None) -> PreTrainedModel:
    """The model that a folder's config.json describes, without reading weights: as transformers
    starts it, or where the caller says so (`torch.device("meta")`) shapes alone. Its experts are
    linear layers where it is known how checkpoints have them (`unfuse.unfuse_experts`).

    Raises:
        InputError: see `read_config`; or transformers cannot build such a model here (an unknown
            activation or rope type, attention of a package that is not installed).
    """
    return model_of(read_config(folder), str(folder / "config.json"), dtype)


def model_of(config: PretrainedConfig, place: str, dtype: str | None = None) -> PreTrainedModel:
    """`build_model` of a configuration, which messages call `place`."""
    kind = {} if dtype is None else {"dtype": DTYPES[dtype]}
    try:
        with quiet_transformers():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **kind
            )
    except Exception as error:  # whatever the family's own code raises
        raise InputError(
            f"{place}: no model can be built of it ({type(error).__name__}: "
            f"{first_line(error)}); correct the field, or install what it asks for"
        ) from None
    unfuse_experts(model)
    return model


def _is_decoder_only(config: PretrainedConfig) -> bool:
    """Whether transformers has a causal language model without an encoder for this.

    `is_decoder` says something of families that are encoders too, such as BERT, whose causal head
    attends to both sides unless it is true. Families that are decoders alone have it false without
    meaning it (GPT-NeoX), or not at all. A first block that sees later tokens all the same is found
    out by `isolation.require_causal`.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        return False
    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", True)


def stored_places(folder: Path) -> Iterator[Place]:
    """Every tensor of a model folder; InputError as `check_checkpoint`."""
    packed = open_encoded(folder)
    return places_in(weight_files(folder)) if packed is None else packed_places(packed)


def open_encoded(folder: Path) -> PackedFolder | ForeignFolder | None:
    """The folder where its layers are stored in parts, ours or in others' formats; None where
    every tensor is stored as it is. InputError as `check_checkpoint`."""
    packed = open_packed(folder)
    if packed is not None:
        return packed
    path = folder / "config.json"
    found = find_config(_read_json(path), str(path))
    return None if found is None else ForeignFolder(folder, found, weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model; InputError if there are none or one is lost."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise InputError(
                f"model folder {folder}: weights only as pickle ({pickles[0]}), which can run "
                "code when read and is refused; convert the model to safetensors"
            )
        raise InputError(f"model folder {folder}: no weights; expected {_WEIGHTS} or {INDEX}")
    raw = _read_json(index)
    shards = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index}: no 'weight_map' in it; copy or download the file again")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if not (folder / name).is_file():
            raise InputError(
                f"{index} names the shard {name}, which is missing; copy or download it again"
            )
    return [folder / name for name in names]


def _check_shard(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_START)) == _LFS_START:
            raise InputError(
                f"{path}: a Git LFS pointer, not weights; run 'git lfs pull' in its repository"
            )
    try:
        with safe_open(path, framework="pt") as shard:
            shard.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: truncated or corrupt ({path.stat().st_size} bytes; {first_line(error)}); "
            "copy or download it again"
        ) from None


def load_model(
    path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a causal language model from a folder, complete and finite, or not at all.

    Args:
        path: model folder, or "embedded"; a packed one is unpacked to dense weights.
        dtype: float32, bfloat16 or float16; the weights are cast to it.
        device: where the weights go.

    Returns:
        The model in evaluation mode. A head that is stored with values of its own is kept, and the
        model's configuration says so (`models.stored.follow_weights`). Experts are linear layers,
        as in `build_model`.

    Raises:
        InputError: see `check_checkpoint`; also tensors that are missing, unexpected or of the
            wrong shape.
            A weight that is NaN or infinite in `dtype` is refused too, by name.

    Cost: one copy of the weights in memory, one pass over them; of packed ones a SHA-256 too.
    """
    if dtype not in DTYPES:
        raise InputError(f"model.dtype={dtype}: unknown; use one of {', '.join(DTYPES)}")
    folder = resolve_path(path)
    check_checkpoint(folder)
    packed = open_encoded(folder)
    kind: Any = AutoModelForCausalLM
    source: Path | None = folder
    given: dict[str, Any] = {}
    if packed is not None:  # from memory, which the class takes, and Auto... does not
        config = read_config(folder)
        kind, source = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], None
        with torch.device("meta"):
            layout = layout_of(model_of(config, str(folder / "config.json")))
        tensors = ((name, packed.dense(name, DTYPES[dtype])) for name in packed.shapes())
        given = {"config": config, "state_dict": dict(layout.joined(tensors))}
    try:
        with quiet_transformers():
            loaded: Any = kind.from_pretrained(
                source, dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True, **given,
                ignore_mismatched_sizes=True,  # they come back in info and are refused below
            )  # fmt: skip
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise InputError(
            f"model folder {folder}: cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from None
    model, info = loaded  # a pair, because of output_loading_info
    if packed is not None and (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    _check_loading_info(folder, info)
    follow_weights(model)
    unfuse_experts(model)
    check_finite(folder, model, dtype)
    return model.to(device).eval()


def _check_loading_info(folder: Path, info: dict[str, Any]) -> None:
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise InputError(
            f"model folder {folder}: tensor {name} has shape {tuple(found)} where config.json "
            f"asks for {tuple(expected)} ({len(mismatched)} such tensors); config.json and weights "
            "are of different models"
        )
    for kind, what in (
        ("missing_keys", "missing from the weights"),
        ("unexpected_keys", "in the weights but not part of the model in config.json"),
    ):
        names = sorted(info[kind])
        if names:
            raise InputError(
                f"model folder {folder}: {len(names)} tensors are {what}, the first is {names[0]}; "
                "config.json and weights are of different models, or a shard is incomplete"
            )


def check_finite(folder: Path, model: torch.nn.Module, dtype: str, prefix: str = "") -> None:
    """InputError when a weight of `model`, read from `folder`, is NaN or infinite as `dtype`.

    Buffers that are stored count, and weights without memory are passed over.
    """
    for name, weight in model.state_dict(prefix=prefix and f"{prefix}.").items():
        if weight.is_meta or not weight.is_floating_point():
            continue
        if num_bad := num_not_finite(weight):
            raise not_finite(folder, name, num_bad, weight.numel(), DTYPES[dtype])


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a file of a tokenizer in a folder."""
    return any(next(folder.glob(name), None) for name in _TOKENIZER_FILES)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, by the rules of its own tokenizer.json.

    Raises:
        InputError: the folder has no tokenizer files, or they cannot be read.
    """
    return read_tokenizer(path)[0]


def read_tokenizer(path: str | Path) -> tuple[PreTrainedTokenizerBase, str | None]:
    """`load_tokenizer`, and what is to be said of it (`models.tokenizer.by_own_rules`)."""
    folder = resolve_path(path)
    with readable(f"model folder {path}"):
        if not folder.is_dir():
            raise InputError(f"model folder {path}: there is no such folder")
        has_files = has_tokenizer(folder)
    if not has_files:
        raise InputError(
            f"model folder {folder}: no tokenizer; copy tokenizer.json and tokenizer_config.json "
            "of the model into it"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer, remark = by_own_rules(folder, tokenizer)
        empty = not tokenizer.get_vocab()
    except Exception as error:
        raise InputError(
            f"model folder {folder}: the tokenizer cannot be read: {first_line(error)}"
        ) from None
    if empty:
        raise InputError(f"model folder {folder}: the tokenizer has no tokens")
    return tokenizer, remark


def load_pair(
    path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model` and `load_tokenizer` of one folder, checked against each other.

    Raises:
        InputError: also when the tokenizer has ids that the model has no embedding for.
    """
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype, device)
    check_vocabulary(model, tokenizer, str(path))
    return model, tokenizer


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """InputError when a token that every text may hold lies beyond the embedding rows of `model`.

    Tokens that were added to the vocabulary stand for a word of their own, which a text may never
    hold: whoever knows the text asks for those (`models.tokenizer.beyond_embedding`).
    """
    embedding: Any = model.get_input_embeddings()
    num_rows = embedding.weight.shape[0]
    marks = (tokenizer.bos_token, tokenizer.eos_token)
    added = tokenizer.get_added_vocab().keys() - {str(mark) for mark in marks}
    beyond = beyond_embedding(tokenizer, num_rows)
    if beyond.keys() - added:
        raise InputError(
            f"model folder {name}: the tokenizer has ids up to {max(beyond.values())}, the model "
            f"has {num_rows} embedding rows; use the tokenizer that belongs to this model"
        )


def check_sequence_length(config: PretrainedConfig, sequence_length: int) -> None:
    """InputError when rows of `sequence_length` tokens are longer than the model's positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and sequence_length > limit:
        raise InputError(
            f"data.sequence_length={sequence_length}: the model has {limit} positions "
            f"(max_position_embeddings); use at most {limit}"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no loading report: what matters in the report is raised instead."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
