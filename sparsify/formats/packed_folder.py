"""Models from either kind of folder: Hugging Face safetensors, or the project's packed file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsify.errors import InputError
from sparsify.formats.packed24 import load_packed, save_packed
from sparsify.formats.sparse_folder import MASKS, PACKED, read_sparsity, write_sparsity
from sparsify.masks.storage import save_masks
from sparsify.models.load import DTYPES, check_finite, load_model
from sparsify.pattern import Pattern
from sparsify.quantization.codes import Quantized


def load_any(folder: Path, dtype: str, device: str | torch.device) -> PreTrainedModel:
    """Load a model folder; a packed one is unpacked to dense tensors.

    Raises:
        InputError: as `load_model`; also a packed file that does not fit the config beside it, or
            holds values that are NaN or infinite.
    """
    if not (folder / PACKED).is_file():
        return load_model(folder, dtype, device)

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    missing, unexpected = model.load_state_dict(load_packed(folder / PACKED), strict=False)
    lost = sorted(set(missing) - model.all_tied_weights_keys.keys())
    if unexpected or lost:
        raise InputError(
            f"{folder / PACKED}: does not fit config.json beside it (missing {lost[:1]}, "
            f"unexpected {sorted(unexpected)[:1]}); quantise the model again"
        )
    model.tie_weights()
    check_finite(folder, model, dtype)
    return model.to(device).eval()


def save_packed_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    masks: Mapping[str, torch.Tensor],
    pattern: Pattern,
    quantized: dict[str, Quantized] | None,
    made_from: Path,
) -> None:
    """Write a packed model folder: packed weights, config, tokenizer, masks and sparsity.json.

    Args:
        folder: made here.
        model: the sparse model; a quantised layer's codes come from `quantized`.
        tokenizer: saved beside it.
        masks: layer name -> bool keep mask (O, I).
        pattern: of the masks.
        quantized: layer name -> codes and scales, or None to pack the weights as they are.
        made_from: model folder whose provenance is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_packed(folder / PACKED, state, masks, pattern, quantized)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_masks(folder / MASKS, masks)
    before = read_sparsity(made_from) or {}
    write_sparsity(
        folder, masks, str(pattern), before.get("method", "given"), before.get("provenance", {})
    )
