"""One family of models through all stages, small and at random: what is done, and what refused.

By the functions that the stages call, in this process and on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from jobs.benchmarks.support.families import SKIP, in_two_documents, random_family
from jobs.benchmarks.support.random_llama import random_rows
from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.distillation.head_loss import Teacher
from sparsify.distillation.student import DistillStudent
from sparsify.errors import TwofourError, first_line
from sparsify.formats.kinds.packed import save_packed_folder
from sparsify.formats.sparse_folder import MASKS, write_sparsity
from sparsify.formats.verify import check_files, check_packed, masks_of
from sparsify.integrations.linear import PackedLinear
from sparsify.integrations.quantizer import check_fits
from sparsify.masks.storage import merge_masks, save_masks
from sparsify.methods import PruneParams, get_method
from sparsify.models.blocks import reason_to_hold_whole
from sparsify.models.calls import logits_of
from sparsify.models.isolation import check_isolation
from sparsify.models.lm_head import check_head
from sparsify.models.load import load_model
from sparsify.models.masked import apply_masks_, mask_gradients
from sparsify.models.save import save_model
from sparsify.models.structure import find_blocks
from sparsify.models.training import prepare_student
from sparsify.params import LossWeights, QuantParams
from sparsify.pattern import Pattern
from sparsify.pruning.prune import LayerChoice, prune_checkpoint, prune_model
from sparsify.quantization import quantize_model
from sparsify.tensors import tensor_names

STAGES = ("prune", "recover", "quantize", "export")

_METHOD, _PATTERN = "twofour", Pattern.parse("2:4")

_NUM_ROWS, _LENGTH, _BATCH = 16, 32, 8

_NUM_STEPS, _LEARNING_RATE = 4, 1e-3

_SEED = 1


@dataclass
class _Family:
    """A family's folders and rows, as its stages come to them."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    rows: TokenRows
    skip: list[str]
    """`prune.skip`"""

    def pruned(self) -> Path:
        """The newest folder of sparse weights."""
        recovered = self.folder / "recovered"
        return recovered if recovered.is_dir() else self.folder / "pruned"


def examine(model_type: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Make a family's model, and prune, recover, quantise, export and reload it.

    Args:
        model_type: a name in `families.FAMILIES`.
        folder: empty; the models are written there.
        tokenizer: saved beside them; the model gets its vocabulary.

    Returns:
        Facts of the model, and a dict for each of `STAGES` that was come to: its figures,
        {"refused": one line} for an error meant for a person, {"failed": one line} for any other.
    """
    dense = random_family(model_type, vocab_size=len(tokenizer))
    dense.save_pretrained(folder / "dense")  # under the names that the family's checkpoints have
    tokenizer.save_pretrained(folder / "dense")
    rows = random_rows(_NUM_ROWS, _LENGTH, len(tokenizer), _SEED)
    found: dict[str, Any] = {
        "class": type(dense).__name__,
        "num_weights": sum(weight.numel() for weight in dense.parameters()),
        "num_other_names": len(_stored_names(folder / "dense") - dense.state_dict().keys()),
    }
    found["isolates"] = _attempt(partial(_isolate, dense))
    if not found["isolates"]:
        rows = in_two_documents(rows)
    family = _Family(folder, tokenizer, rows, SKIP.get(model_type, []))
    found["held_whole"] = _attempt(lambda: {"why": reason_to_hold_whole(folder / "dense")})
    stages: dict[str, Callable[[_Family], dict[str, Any]]] = {
        "prune": _prune, "recover": _recover, "quantize": _quantize, "export": _export,
    }  # fmt: skip
    for stage in STAGES:
        found[stage] = _attempt(partial(stages[stage], family))
        for how in found[stage].keys() & {"refused", "failed"}:
            found[stage][how] = found[stage][how].replace(f"{folder}/", "")
        if stage == "prune" and "zero_share" not in found[stage]:
            break  # nothing to go on with
    layers = found["prune"].pop("layers", None)
    if layers is not None:
        found["dense"] = _dense_weights(load_model(folder / "dense"), layers)
    return found


def _attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, or how it ended."""
    try:
        return run()
    except TwofourError as error:
        return {"refused": first_line(error)}
    except Exception as error:  # whatever a family's own code raises is the finding
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def _isolate(model: Any) -> dict[str, Any]:
    """Nothing where documents are kept apart."""
    check_isolation(model)
    return {}


def _stored_names(folder: Path) -> set[str]:
    """Names of all tensors in a model folder's files."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(tensor_names(file))
    return names


def _prune(family: _Family) -> dict[str, Any]:
    dense, out = family.folder / "dense", family.folder / "pruned"
    more: Any = {
        "comm": Comm.single(), "memory": Memory(_BATCH), "layers": LayerChoice(family.skip),
    }  # fmt: skip
    how = (family.rows, get_method(_METHOD), _PATTERN, PruneParams())
    if reason_to_hold_whole(dense) is None:
        result = prune_checkpoint(dense, out, *how, **more)
        family.tokenizer.save_pretrained(out)
        merge_masks(sorted(out.glob("masks-*.safetensors")), out / MASKS)
        for path in out.glob("masks-*.safetensors"):
            path.unlink()
    else:
        model = load_model(dense)
        result = prune_model(model, *how, **more)
        save_model(model, family.tokenizer, out)
        save_masks(out / MASKS, result.keep_masks)
    masks, _ = masks_of(out, pattern=str(_PATTERN))
    write_sparsity(out, masks, str(_PATTERN), _METHOD, {})
    gate = check_files(out, masks, _PATTERN)
    weights = load_model(out).parameters()
    zeros = total = 0
    for weight in weights:
        zeros += int((weight == 0).sum())
        total += weight.numel()
    return {**gate, "zero_share": zeros / total, "layers": [layer.name for layer in result.layers]}


def _recover(family: _Family) -> dict[str, Any]:
    pruned = family.folder / "pruned"
    student, teacher = load_model(pruned), load_model(family.folder / "dense")
    masks, pattern = masks_of(pruned)
    head = check_head(teacher)
    prepare_student(student)
    apply_masks_(student, masks)
    mask_gradients(student, masks)
    trained = DistillStudent(student)
    rows, losses = family.rows[:_BATCH], []
    with torch.no_grad():
        states_BTD = head.base(
            input_ids=rows.ids_NT, position_ids=rows.positions_NT, use_cache=False
        ).last_hidden_state
    optimizer = torch.optim.AdamW(student.parameters(), lr=_LEARNING_RATE)
    for _ in range(_NUM_STEPS):
        loss, _ = trained(rows, LossWeights(), teacher=Teacher(states_BTD, head.plain()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    out = family.folder / "recovered"
    save_model(student, family.tokenizer, out)
    save_masks(out / MASKS, masks)
    write_sparsity(out, masks, str(pattern), _METHOD, {})
    return {**check_files(out, masks, pattern), "losses": losses}


def _quantize(family: _Family) -> dict[str, Any]:
    source, out = family.pruned(), family.folder / "packed"
    model = load_model(source)
    masks, pattern = masks_of(source)
    result = quantize_model(
        model, family.rows, masks, QuantParams(group_size=16), comm=Comm.single(),
        batch_size=_BATCH,
    )  # fmt: skip
    save_packed_folder(out, model, family.tokenizer, masks, pattern, result.layers, source)
    return {**check_packed(out), "difference": _difference(model, load_model(out))}


def _export(family: _Family) -> dict[str, Any]:
    source, out = family.pruned(), family.folder / "sparse"
    model = load_model(source)
    masks, pattern = masks_of(source)
    save_model(model, family.tokenizer, out)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_fits(model, masks, shapes, pattern)
    save_packed_folder(
        family.folder / "sparse-packed", model, family.tokenizer, masks, pattern, None, source
    )
    gate = check_files(out, masks, pattern)
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto", local_files_only=True)
    packed = family.folder / "sparse-packed"
    held = AutoModelForCausalLM.from_pretrained(packed, dtype="auto", local_files_only=True)
    for module in held.modules():
        if isinstance(module, PackedLinear):
            module.uses_kernels = False  # bits are compared
    return {
        **gate,
        "has_same_names": _stored_names(out) == _stored_names(family.folder / "dense"),
        "difference": max(
            _difference(model, other) for other in (reloaded, load_model(packed), held)
        ),
    }


@torch.no_grad()
def _difference(model: Any, other: Any) -> float:
    """Largest difference of two models' logits on one row."""
    vocabulary: int = model.get_input_embeddings().num_embeddings
    rows = random_rows(1, _LENGTH, vocabulary, _SEED + 1)
    return float((logits_of(model.eval(), rows) - logits_of(other.eval(), rows)).abs().max())


def _dense_weights(model: Any, layers: list[str]) -> dict[str, float]:
    """Matrices in the blocks that stay dense, by their name in a block -> share of all weights."""
    pruned = {f"{name}.weight" for name in layers}
    total = sum(weight.numel() for weight in model.parameters())
    list_name, blocks = find_blocks(model)
    found: dict[str, float] = {}
    for name, weight in blocks.named_parameters():
        if weight.ndim > 1 and f"{list_name}.{name}" not in pruned:
            short = re.sub(r"\b\d+\.", "", name).removesuffix(".weight")
            found[short] = found.get(short, 0.0) + weight.numel() / total
    return found
