"""Integers for weights, every zero left in place."""

from sparsify.params import QuantParams
from sparsify.quantization.codes import Quantized, dequantize
from sparsify.quantization.gptq import quantize_weight
from sparsify.quantization.quantize import QuantResult, quantize_model

__all__ = [
    "QuantParams", "QuantResult", "Quantized", "dequantize", "quantize_model", "quantize_weight",
]  # fmt: skip
