"""What each modifier of pruning and training comes to in options; docs/recipes.md has the table."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jobs.cli.recipe.args import Args
from jobs.cli.recipe.names import are_all, merged, skip_of
from jobs.cli.recipe.quantization import quantize
from sparsify.errors import InputError

_METHODS = {
    "SparseGPTModifier": "sparsegpt", "WandaPruningModifier": "wanda",
    "MagnitudePruningModifier": "magnitude", "MagnitudeModifier": "magnitude",
}  # fmt: skip


def _prune(args: Args, name: str) -> None:
    """One-shot pruning. Their N:M counts the pruned weights of a group, ours the kept ones."""
    found = args.found
    found.add_stage("prune", args.where())
    args.set("prune.method", _METHODS[name])
    args.set("prune.pattern", _pattern(args), "mask_structure")
    args.set_number("prune.block_size", "block_size", whole=True)
    args.set_number("prune.damping", "dampening_frac", "percdamp")
    sequential = args.take("sequential_update")
    if sequential is not None:
        args.set("prune.order", "block" if sequential else "dense", "sequential_update")
    if args.take("preserve_sparsity_mask"):
        args.set("prune.existing", "extend", "preserve_sparsity_mask")
    skip = skip_of(args.take("ignore"), args.take("targets"), args.where("ignore"))
    if skip:
        found.options["prune.skip"] = merged(found.options.get("prune.skip", []), skip)
    uneven = "layers of one model are pruned alike here, or by prune.budget"
    args.refuse(uneven, "sparsity_profile", "owl_m", "owl_lmbda")
    args.refuse("it is pruned at once here, not step by step", "init_sparsity", "update_frequency")
    args.refuse("it is pruned before training starts", "start", "end")
    args.refuse("quantising is a modifier of its own, GPTQModifier", "quantize")
    args.drop("it decides memory alone", "offload_hessians")
    args.drop("inputs are taken from every linear layer", "target_ids")
    args.take("leave_enabled")
    args.done()


def _pattern(args: Args) -> str:
    share = args.take("sparsity")
    share = args.take("final_sparsity") if share is None else share
    structure = str(args.take("mask_structure", "0:0"))
    if isinstance(share, list):
        raise InputError(
            f"{args.where('sparsity')} is a list, one for each layer; layers of one model are "
            "pruned alike here"
        )
    try:
        value = None if share is None else float(share)
    except (TypeError, ValueError):
        raise InputError(f"{args.where('sparsity')} is {share!r}, not a number") from None
    match = re.fullmatch(r"(\d+):(\d+)", structure)
    if match is None:
        raise InputError(f"{args.where('mask_structure')} is {structure!r}, not N:M")
    pruned, width = int(match[1]), int(match[2])
    if not width:
        if value is None or not 0 < value < 1:
            raise InputError(f"{args.where('sparsity')} is {share!r}, not a share between 0 and 1")
        return f"unstructured:{value:g}"
    if not 0 < pruned < width:
        raise InputError(f"{args.where('mask_structure')}={structure!r} prunes nothing or all")
    if value is not None and abs(value - pruned / width) > 1e-9:
        raise InputError(
            f"{args.where('sparsity')}={value:g} with mask_structure={structure!r}, which prunes "
            f"{pruned} of every {width}: {pruned / width:g}"
        )
    return f"{width - pruned}:{width}"


def _own_prune(args: Args, _: str) -> None:
    """What is written for methods of ours: the keys of SparseGPT's, and which it is."""
    method = args.take("method")
    args.found.add_stage("prune", args.where())
    args.set("prune.method", method)
    args.set("prune.pattern", _pattern(args), "mask_structure")
    args.set_number("prune.block_size", "block_size", whole=True)
    args.set_number("prune.damping", "dampening_frac")
    if skip := skip_of(args.take("ignore"), args.take("targets"), args.where("ignore")):
        args.set("prune.skip", skip, "ignore")
    args.done()


def _constant(args: Args, _: str) -> None:
    """Masks that stay while the model is trained, as recovery has them anyway."""
    args.found.add_stage("distill", args.where())
    args.set("distill.moving_share", 0.0)
    targets = args.take("targets")
    targets = args.take("params") if targets is None else targets
    if targets is not None and not are_all(targets):
        args.found.warnings.append(
            f"{args.where('targets')}={targets!r}: the zeros of all pruned layers are held, "
            "whatever it names"
        )
    args.refuse("zeros are held from the first step on", "start", "start_epoch")
    args.drop(
        "zeros are held until the end", "end", "end_epoch", "update_frequency", "leave_enabled"
    )
    args.done()


def _output_distillation(args: Args, _: str) -> None:
    """Terms of the loss; several modifiers add terms."""
    args.found.add_stage("distill", args.where())
    kind = args.only(
        "comparison", ("kl_divergence", "square_head"),
        "comparisons are kl_divergence and square_head",
    )  # fmt: skip
    targets = args.take("targets")
    named = [str(one) for one in (targets if isinstance(targets, list) else [targets])]
    is_head = all(re.fullmatch(r"(re:)?\^?(\.\*)?(lm_head|model|logits)\$?", one) for one in named)
    if targets is not None and not are_all(targets) and not (is_head and kind == "kl_divergence"):
        raise InputError(
            f"{args.where('targets')}={targets!r}: square_head compares all blocks, "
            "kl_divergence the logits"
        )
    term = "distill.square_head_weight" if kind == "square_head" else "distill.kl_weight"
    scale, own = args.number("distill_scale"), args.number("orig_scale")
    args.set(term, 1.0 if scale is None else scale, "distill_scale")
    args.set("distill.ce_weight", 1.0 if own is None else own, "orig_scale")
    args.refuse("distillation lasts from the first step to the last", "start", "end")
    args.refuse(
        "hidden states and logits are compared as they are", "transforms", "projection",
        "projection_args", "transforms_args", "comparison_args",
    )  # fmt: skip
    args.drop("it decides memory alone", "offload_layer_output")
    args.done()


def _distillation(args: Args, _: str) -> None:
    """Of the logits, as SparseML had it before 2024."""
    args.found.add_stage("distill", args.where())
    hardness = args.number("hardness")
    hardness = 0.5 if hardness is None else hardness
    if not 0 <= hardness <= 1:
        raise InputError(f"{args.where('hardness')}={hardness:g}: a share from 0 to 1")
    args.set("distill.kl_weight", hardness, "hardness")
    args.set("distill.ce_weight", round(1 - hardness, 12), "hardness")
    args.set_number("distill.temperature", "temperature")
    args.drop("logits are compared", "distill_output_keys")
    args.drop(
        "training lasts for distill.num_tokens", "start_epoch", "end_epoch", "update_frequency"
    )
    args.done()


def _learning_rate(args: Args, _: str) -> None:
    """Peak and end; how long it takes is in tokens here."""
    args.found.add_stage("distill", args.where())
    args.only(
        "lr_func", ("linear", "cosine"),
        "learning rates fall once, from the peak to the end; cycles are not done",
    )  # fmt: skip
    first, last = args.number("init_lr"), args.number("final_lr")
    if first is not None and last is not None and last > first:
        args.set("distill.learning_rate", last, "final_lr")
        args.found.warnings.append(
            f"{args.where('init_lr')}={first:g}: a rise to {last:g} is the warm-up here; give its "
            "length with distill.num_warmup_steps"
        )
    elif first is not None:
        args.set("distill.learning_rate", first, "init_lr")
        if last is not None:
            args.set("distill.min_learning_rate_share", last / first, "final_lr")
    args.drop("training lasts for distill.num_tokens", "start_epoch", "end_epoch", "cycle_epochs")
    args.done()


def _set_learning_rate(args: Args, _: str) -> None:
    args.found.add_stage("distill", args.where())
    args.set_number("distill.learning_rate", "learning_rate")
    args.drop("training lasts for distill.num_tokens", "start_epoch", "end_epoch")
    args.done()


def _epochs(args: Args, _: str) -> None:
    """Epochs need the size of the data, which is not known here."""
    args.drop("give the length of training with distill.num_tokens", "start_epoch", "end_epoch")
    args.done()


MODIFIERS: dict[str, Callable[[Args, str], None]] = {
    **dict.fromkeys(_METHODS, _prune),
    "TwofourPruningModifier": _own_prune,
    "ConstantPruningModifier": _constant,
    "OutputDistillationModifier": _output_distillation,
    "DistillationModifier": _distillation,
    "LearningRateFunctionModifier": _learning_rate,
    "SetLearningRateModifier": _set_learning_rate,
    "EpochRangeModifier": _epochs,
    "GPTQModifier": quantize,
    "QuantizationModifier": quantize,
}
"""name -> what reads its arguments"""

TRAINING = (
    "ConstantPruningModifier", "OutputDistillationModifier", "DistillationModifier",
    "LearningRateFunctionModifier", "SetLearningRateModifier", "EpochRangeModifier",
)  # fmt: skip
"""those that belong to a stage of run_type train"""

_SCALES = "it moves weights between layers before they are quantised, which is not done here"
_GRADUAL = "it prunes step by step in training; one-shot methods and recovery are done here"

REFUSED: dict[str, Any] = {
    "AWQModifier": _SCALES,
    "SmoothQuantModifier": _SCALES,
    "LogarithmicEqualizationModifier": _SCALES,
    "QuIPModifier": "it rotates while the model runs",
    "SpinQuantModifier": "it rotates while the model runs",
    "AutoRoundModifier": "it is another quantiser; gptq and rtn are done here",
    "REAPModifier": "it drops experts",
    "GMPruningModifier": _GRADUAL,
    "OBSPruningModifier": _GRADUAL,
    "GlobalMagnitudePruningModifier": _GRADUAL,
    "ACDCPruningModifier": _GRADUAL,
    "MovementPruningModifier": _GRADUAL,
    "LegacyQuantizationModifier": "it trains with quantised activations",
    "LearningRateModifier": "it names a scheduler of PyTorch by its class",
    "TrainableParamsModifier": "all weights are trained here",
}
"""name -> why it is refused"""
