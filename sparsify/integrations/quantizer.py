"""Registers the packed format with transformers: its configuration, and the quantizer.

Everything is checked before a weight is loaded: the index, the headers, every tensor's hash, and
that the files hold exactly the tensors that the model has. transformers itself only warns about a
missing tensor, and goes on with random values.
"""

from __future__ import annotations

import copy
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsify.errors import InputError
from sparsify.integrations.dense import leave_dense, speed_up_dense
from sparsify.integrations.linear import PackedLinear
from sparsify.models.layout import layout_of
from sparsify.models.unfuse import unfuse_experts
from sparsify.packed.folder import PackedFolder, write_index
from sparsify.packed.layout import METHOD, Contents, Layer, Scheme
from sparsify.pattern import Pattern


@register_quantization_config(METHOD)
class TwofourConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed folder's config.json, as transformers holds it.

    Raises:
        InputError: of another version, or nothing that the format has.
    """

    def __init__(self, **value: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.contents = Contents.from_dict({**value, "quant_method": METHOD}, "config.json")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return self.contents.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing of it is a default."""
        return self.to_dict()


@register_quantizer(METHOD)
class TwofourQuantizer(HfQuantizer):
    """Puts packed layers where the configuration names them, and refuses what does not fit."""

    def is_serializable(self) -> bool:
        """`save_pretrained` writes a packed folder again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed layers have no gradients."""
        return False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed but torch; but dense weights are packed by `jobs.export`, not here."""
        if not self.pre_quantized:
            raise InputError(
                "quantization_config: a model is packed by 'python -m jobs.export', and loaded "
                "from that folder without this argument"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise InputError("a packed model is loaded from its folder, not from a state_dict")
        # Not resolved: in the Hub's cache the files are links, and the index lies beside those.
        folder = PackedFolder(Path(checkpoint_files[0]).parent, self.quantization_config.to_dict())
        put_checked_layers(model, folder)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.settle()
        speed_up_dense(model)
        # As an attribute of this one model: transformers has no door for what follows a save.
        model.save_pretrained = types.MethodType(_save_packed, model)  # type: ignore[method-assign]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if isinstance(dtype, str):  # as a save leaves it in the configuration
            dtype = getattr(torch, dtype)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
        for name, module in layers.items():
            if module.weight.is_meta:
                raise InputError(
                    f"dequantize: {name} is offloaded; load the model without a device_map first"
                )
        for name, module in layers.items():
            model.set_submodule(name, dense_layer(module, dtype or model.dtype))
        leave_dense(model)
        model.__dict__.pop("save_pretrained", None)
        if layout_of(model).fused:
            model.save_pretrained = types.MethodType(_save_dense, model)
        return model


def put_checked_layers(model: PreTrainedModel, folder: PackedFolder) -> None:
    """`put_packed_layers`, and everything that can be checked before a weight is loaded.

    Raises:
        InputError: a file is damaged, or the folder does not hold exactly the model's tensors.

    Cost: reads all files once; a SHA-256 over everything.
    """
    folder.check_bytes()
    put_packed_layers(model, folder.contents)
    check_names(model, {name: folder.place(name).shape for name in folder}, str(folder.folder))


def put_packed_layers(model: nn.Module, contents: Contents) -> None:
    """Replace the layers that are packed, in place, with empty ones on the meta device. Experts
    become linear layers first, as they are wherever this project makes a model.

    Raises:
        InputError: the model has no such linear layer, or one of another shape, or one that
            computes something else (a router); or the pattern is unstructured, which no layer is.
    """
    if not contents.pattern.is_structured:
        raise InputError(
            f"pattern {contents.pattern}: packed layers compute N:M patterns; for this one use the "
            "dense export"
        )
    unfuse_experts(model)
    modules = dict(model.named_modules())
    plain: dict[type, bool] = {}
    for name, layer in contents.layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise InputError(
                f"config.json: {name} is packed, but {type(model).__name__} has no such linear "
                "layer; configuration and weights are of different models"
            )
        _check_shape(name, tuple(module.weight.shape), layer)
        if not plain.setdefault(type(module), type(module).forward is nn.Linear.forward):
            plain[type(module)] = _multiplies(module)
        if not plain[type(module)]:
            raise InputError(
                f"{name} is a {type(module).__name__}, which computes something else than a linear "
                "layer; leave it dense (prune.skip)"
            )
        with torch.device("meta"):
            packed = PackedLinear(layer, module.weight.dtype, module.bias is not None)
        model.set_submodule(name, packed)


def check_fits(
    model: PreTrainedModel, layers: Iterable[str], shapes: Mapping[str, tuple[int, ...]],
    pattern: Pattern,
) -> None:  # fmt: skip
    """Require that transformers can load a model whose linear layers are packed.

    Args:
        model: of which the configuration counts.
        layers: names of those to pack.
        shapes: stored name -> shape of the dense tensors.
        pattern: of the layers.

    Raises:
        InputError: a layer is no linear layer of the model, or its tensors would not be found; the
            family is named.
    """
    if not pattern.is_structured:
        return  # read by this project alone
    with torch.device("meta"):
        packed = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    known = {name: Layer(_matrix(shapes[f"{name}.weight"]), Scheme(), pattern) for name in layers}
    try:
        put_packed_layers(packed, Contents(pattern, known))
        found = dict(shapes)
        for name, layer in known.items():
            for part, (_, shape) in layer.parts().items():
                found[f"{name}.{part}"] = shape
        check_names(packed, found, "to be written")
    except InputError as error:
        raise InputError(
            f"export.formats: {type(model).__name__} cannot be written packed, for transformers "
            f"would not load it ({error}); use export.formats=[dense]"
        ) from None


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    num_rows, num_columns = shape
    return num_rows, num_columns


def _multiplies(module: nn.Linear) -> bool:
    """Whether a kind of nn.Linear with a forward of its own gives x Wᵀ + b: tried with numbers."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    probe = copy.copy(module)
    held = {name: p for name, p in module._parameters.items() if p is not None}
    probe._parameters = {
        **module._parameters, **{n: nn.Parameter(numbers(*p.shape)) for n, p in held.items()},
    }  # fmt: skip
    x = numbers(1, 2, module.in_features)
    try:
        found = probe(x)
    except Exception:  # whatever a family's own code raises: it wants something else than x
        return False
    expected = nn.functional.linear(x, probe.weight, probe.bias)
    same_shape = isinstance(found, Tensor) and found.shape == expected.shape
    return same_shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def dense_layer(packed: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    """An nn.Linear of the weight that a packed layer stands for."""
    linear = nn.Linear(packed.in_features, packed.out_features, False, device="meta")
    linear.weight = nn.Parameter(packed.dense_weight(dtype))
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.detach().to(dtype))
    return linear


def check_names(model: Any, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Require that files hold the tensors of a model, no fewer and no more, by transformers' rules.

    Args:
        model: with its packed layers in place; values do not count.
        shapes: stored name -> shape.
        where: the files, for messages.

    Raises:
        InputError: a tensor is missing, unexpected, or of another shape; names it.
    """
    state = model.state_dict()
    found = _names_in_model(model, state, shapes)
    info = types.SimpleNamespace(
        missing_keys=state.keys() - {name for name, _ in found.values()},
        unexpected_keys={name for name, (own, _) in found.items() if own not in state},
    )
    if not info.missing_keys and not info.unexpected_keys:
        tied: set[str] = set()
    else:
        tied = set(model.all_tied_weights_keys)
        model._adjust_missing_and_unexpected_keys(info)
    if lost := sorted(set(info.missing_keys) - tied):
        raise InputError(
            f"packed folder {where}: tensor {lost[0]} is missing ({len(lost)} in all), which "
            f"{type(model).__name__} needs; export the model again"
        )
    if extra := sorted(info.unexpected_keys):
        raise InputError(
            f"packed folder {where}: tensor {extra[0]} is no part of {type(model).__name__} "
            f"({len(extra)} in all); configuration and weights are of different models"
        )
    for name, (own, is_merged) in found.items():
        if own in state and not is_merged and tuple(state[own].shape) != tuple(shapes[name]):
            raise InputError(
                f"packed folder {where}: tensor {name} has shape {tuple(shapes[name])} where "
                f"config.json asks for {tuple(state[own].shape)}; configuration and weights are of "
                "different models"
            )


def _names_in_model(
    model: Any, state: dict[str, Any], names: Iterable[str]
) -> dict[str, tuple[str, bool]]:
    """What transformers calls each stored tensor, and whether it merges or splits it on the way."""
    found = {name: (name, False) for name in names if name in state}
    others = [name for name in names if name not in found]
    conversions = get_model_conversion_mapping(model) if others else []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    for name in others:
        own, pattern = rename_source_key(name, renamings, converters, prefix, state)
        found[name] = own, pattern is not None
    return found


def _check_shape(name: str, shape: tuple[int, ...], layer: Layer) -> None:
    if shape != layer.shape:
        raise InputError(
            f"config.json: {name} is packed as {layer.shape}, the model's is {shape}; "
            "configuration and weights are of different models"
        )


def _save_packed(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    """`save_pretrained` of a packed model: what transformers writes, and the packed index.

    Raises:
        InputError: `push_to_hub`, which would send the folder off before it has its index.
    """
    if kwargs.get("push_to_hub"):
        raise InputError(
            "push_to_hub: save the packed model to a folder first, then upload the folder"
        )
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    folder = Path(save_directory)
    whole = folder / "model.safetensors"
    if whole.is_file():
        whole.replace(folder / "model-00001-of-00001.safetensors")
    names = [path.name for path in folder.glob("model-*-of-*.safetensors")]
    quantizer: Any = model.hf_quantizer
    write_index(folder, names, quantizer.quantization_config.to_dict())


def _save_dense(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    """`save_pretrained` of a model whose family stores the experts of a layer in one tensor."""
    state: Mapping[str, Tensor] = kwargs.pop("state_dict", None) or model.state_dict()
    kwargs["state_dict"] = dict(layout_of(model).joined(state.items()))
    type(model).save_pretrained(model, save_directory, *args, **kwargs)


for _save in (_save_packed, _save_dense):
    _save.__name__ = "save_pretrained"
