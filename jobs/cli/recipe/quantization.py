"""What modifiers of quantisation come to in options."""

from __future__ import annotations

from typing import Any

from jobs.cli.recipe.args import Args
from jobs.cli.recipe.names import merged, skip_of
from sparsify.errors import InputError
from sparsify.params import close_match

PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": {"quantize.scheme": "int4", "quantize.group_size": 128},
    "W4A16_ASYM": {
        "quantize.scheme": "int4", "quantize.group_size": 128, "quantize.symmetric": False,
    },
    "W8A16": {"quantize.scheme": "int8", "quantize.group_size": -1},
    "W8A8": {"quantize.scheme": "w8a8"},
    "INT8": {"quantize.scheme": "w8a8"},
    "FP8_DYNAMIC": {"quantize.scheme": "fp8"},
}  # fmt: skip
"""scheme by name -> options"""

_STATIC = "activations of fixed scales have to be calibrated, which is not done; use {}"


def quantize(args: Args, name: str) -> None:
    """GPTQ, or rounding to nearest."""
    found = args.found
    found.add_stage("quantize", args.where())
    args.set("quantize.method", "gptq" if name == "GPTQModifier" else "rtn")
    targets = args.take("targets")
    scheme, groups = args.take("scheme"), args.take("config_groups")
    if (scheme is None) == (not groups):
        raise InputError(
            f"{args.where('scheme')}: a scheme's name or config_groups, one of the two, says what "
            "to quantise to"
        )
    if scheme is not None:
        if isinstance(scheme, dict) and len(scheme) == 1:
            ((scheme, targets),) = scheme.items()
        options = _by_name(scheme, args)
    else:
        targets, options = _by_groups(groups, args)
    for key, value in options.items():
        args.set(key, value, "scheme" if scheme is not None else "config_groups")
    skip = skip_of(args.take("ignore"), targets, args.where("ignore"))
    if skip:
        found.options["quantize.skip"] = merged(found.options.get("quantize.skip", []), skip)
    args.set_number("quantize.block_size", "block_size", whole=True)
    args.set_number("quantize.damping", "dampening_frac", "percdamp")
    _actorder(args.take("actorder"), args)
    args.refuse("the cache of keys and values stays as it is", "kv_cache_scheme")
    args.refuse("layers of one model are quantised alike", "scheme_overrides")
    args.drop("blocks are quantised one after another", "sequential_update")
    args.drop("it decides memory alone", "offload_hessians")
    args.drop("scales are searched for the least error", "weight_observer", "observer")
    args.drop("nothing is trained with rounded weights", "disable_quantization_observer_epoch",
              "post_oneshot_calibration")  # fmt: skip
    args.done()


def _by_name(scheme: Any, args: Args) -> dict[str, Any]:
    options = PRESETS.get(str(scheme).upper())
    if options is None:
        fix = _STATIC.format("FP8_DYNAMIC") if str(scheme).upper() == "FP8" else (
            f"no such scheme here{close_match(str(scheme), list(PRESETS))}; there are "
            f"{', '.join(PRESETS)}"
        )  # fmt: skip
        raise InputError(f"{args.where('scheme')}={scheme!r}: {fix}")
    return options


def _by_groups(groups: Any, args: Args) -> tuple[Any, dict[str, Any]]:
    """Targets and options of the one group."""
    where = args.where("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise InputError(f"{where}: one group for all layers is read; make it one")
    ((name, group),) = groups.items()
    if not isinstance(group, dict):
        raise InputError(f"{where}: {name} is {group!r}, not a mapping")
    left = dict(group)
    targets, weights = left.pop("targets", ["Linear"]), left.pop("weights", None)
    inputs = left.pop("input_activations", None)
    if left.pop("output_activations", None):
        raise InputError(f"{where}: {name}.output_activations: outputs are not rounded")
    if (kind := left.pop("format", None)) is not None:
        args.found.warnings.append(
            f"{where}.{name}.format={kind!r} is left out: export.formats says what is written"
        )
    if left or not isinstance(weights, dict):
        raise InputError(f"{where}: {name}.{next(iter(left), 'weights')}: unknown, or no mapping")
    return targets, _of_weights(dict(weights), inputs, f"{where}: {name}", args)


def _of_weights(weights: dict[str, Any], inputs: Any, where: str, args: Args) -> dict[str, Any]:
    bits, kind = weights.pop("num_bits", 8), weights.pop("type", "int")
    symmetric = bool(weights.pop("symmetric", True))
    size = weights.pop("group_size", None)
    strategy = weights.pop("strategy", None) or ("group" if size not in (None, -1) else "channel")
    _actorder(weights.pop("actorder", None), args)
    for key in ("observer", "observer_kwargs"):
        if value := weights.pop(key, None):
            args.found.warnings.append(
                f"{where}.weights.{key}={value!r} is left out: scales are searched for the least "
                "error"
            )
    for key, value in weights.items():
        if value not in (None, False, {}):
            raise InputError(f"{where}.weights.{key}={value!r}: not done here; remove it")
    if strategy not in ("channel", "group") or (strategy == "group" and not size):
        raise InputError(
            f"{where}.weights.strategy={strategy!r}: one scale for each output channel (channel) "
            "or group of columns (group, with group_size) is done"
        )
    per_token = _per_token(inputs, where)
    if (kind, bits, per_token, strategy) == ("float", 8, "float", "channel"):
        return {"quantize.scheme": "fp8"}
    if (kind, bits, per_token, strategy, symmetric) == ("int", 8, "int", "channel", True):
        return {"quantize.scheme": "w8a8"}
    if kind != "int" or bits not in (4, 8) or per_token is not None:
        raise InputError(
            f"{where}: {kind} weights of {bits} bits, {strategy}, with {per_token or 'no'} "
            f"activations are not done; there are {', '.join(PRESETS)} and groups of other sizes"
        )
    options = {
        "quantize.scheme": f"int{bits}",
        "quantize.group_size": size if strategy == "group" else -1,
    }
    return options if symmetric else {**options, "quantize.symmetric": False}


def _per_token(inputs: Any, where: str) -> str | None:
    """int or float for activations of 8 bits with a scale for every token, None for none."""
    if not inputs:
        return None
    if not isinstance(inputs, dict) or inputs.get("num_bits") != 8 or inputs.get("type") is None:
        raise InputError(f"{where}.input_activations: 8 bits of int or float are done")
    if not inputs.get("dynamic") or inputs.get("strategy") not in (None, "token"):
        raise InputError(
            f"{where}.input_activations: " + _STATIC.format("dynamic: true, strategy: token")
        )
    return str(inputs["type"])


def _actorder(value: Any, args: Args) -> None:
    if value in (None, False):
        return
    if str(value).lower() in ("static", "weight"):
        args.found.warnings.append(
            f"{args.where('actorder')}={value!r} is left out: columns are quantised as they lie, "
            "and then again, each with the others fixed"
        )
        return
    raise InputError(
        f"{args.where('actorder')}={value!r}: columns stay in their order, as the packed format "
        "has them; use null"
    )
