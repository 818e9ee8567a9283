"""The quantisation method `twofour` of vLLM: linear layers that hold packed tensors.

vLLM asks the configuration which method each layer has, the method makes the layer's parameters,
vLLM's own loader fills them from the files (each process takes its rows or columns), and a
`PackedLinear` of them computes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from sparsify.integrations.linear import PackedLinear
from sparsify.integrations.quantizer import put_checked_layers
from sparsify.integrations.vllm.shares import fused_layer, may_copy, share_of
from sparsify.kernels.cuda.card import use_card
from sparsify.packed.folder import PackedFolder
from sparsify.packed.layer import DTYPE_NAMES, DTYPES
from sparsify.packed.layout import METHOD, Contents, Layer


def register() -> None:
    """Tell vLLM of the method; its entry point, called once in each of its processes."""
    register_quantization_config(METHOD)(TwofourConfig)


class TwofourConfig(QuantizationConfig):
    """`quantization_config` of a packed folder's config.json, as vLLM holds it."""

    def __init__(self, contents: Contents) -> None:
        super().__init__()
        self.contents = contents
        self.layers = dict(contents.layers)
        """under the names that vLLM's model has for them"""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TwofourConfig:
        """Read it; InputError where it is of another version, or nothing that the format has."""
        return cls(Contents.from_dict(config, "config.json"))

    def get_name(self) -> str:
        """What vLLM calls the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of the inputs of layers."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: what the kernels are written for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check the folder before any process is started for it; one of the Hub is fetched first.

        Raises:
            InputError: it is damaged, or does not hold exactly the tensors of its model.

        Cost: SHA-256 of all files, which are then in the page cache.
        """
        folder = Path(model_name)
        if not folder.is_dir():
            folder = Path(download_weights_from_hf(model_name, None, ["*.safetensors"], revision))
        config = AutoConfig.from_pretrained(model_name, revision=revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        put_checked_layers(model, PackedFolder(folder, self.contents.to_dict()))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow the names that vLLM's model has for its layers."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """How a layer computes; None: as vLLM has it, which is how dense ones do."""
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parent, dot, own = prefix.rpartition(".")
        names = [parent + dot + part for part in self.packed_modules_mapping.get(own, [own])]
        whole = fused_layer(prefix, {name: self.layers.get(name) for name in names})
        if whole is not None:
            return TwofourLinearMethod(prefix, whole)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


@cache
def _allow_copies() -> None:
    use_card(may_copy=True)


@register_weight_loader_v2_supported_method
class TwofourLinearMethod(LinearMethodBase):
    """One packed layer of vLLM's model.

    Args:
        name: that vLLM has for it.
        whole: how it is stored, over all processes.
    """

    def __init__(self, name: str, whole: Layer) -> None:
        self.name, self.whole = name, whole

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **how: Any,
    ) -> None:  # fmt: skip
        """Give the layer this process's share of the tensors, to be loaded.

        Raises:
            InputError: the tensor parallel size cuts what must stay together, or
                `--additional-config` says something of this method that it does not know.
        """
        self.dtype = params_dtype
        config = get_current_vllm_config_or_none()
        copies = config is not None and may_copy(config.additional_config)
        if copies and torch.get_default_device().type == "cuda":
            _allow_copies()
        self.share = share_of(
            self.name, self.whole, sum(output_partition_sizes), input_size_per_partition
        )
        loader = how["weight_loader"]
        for part, (stored, shape) in self.share.parts(DTYPE_NAMES[params_dtype]).items():
            data = torch.empty(shape, dtype=DTYPES[stored])
            if part in ("weight_scales", "weight_zeros") and self.whole.num_groups == 1:
                own = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
            else:
                own = ModelWeightParameter(
                    data=data, input_dim=1, output_dim=0, weight_loader=loader
                )
            layer.register_parameter(part, own)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put what was loaded into a `PackedLinear`, and that into the order of its kernels."""
        parts = {part: getattr(layer, part).data for part in self.share.parts()}
        with torch.device("meta"):
            packed = PackedLinear(self.share, self.dtype, has_bias=False)
        packed.load_state_dict(parts, assign=True)
        for part in parts:
            delattr(layer, part)
        layer.packed = packed
        # A first product: whatever its kernels do once, they do before the server says ready.
        device = parts["weight"].device
        packed(torch.zeros(1, self.share.shape[1], dtype=self.dtype, device=device))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., I) to (..., O) of this process."""
        return layer.packed.product(x, bias, layer.packed.kind is not None)  # type: ignore[union-attr,operator]
