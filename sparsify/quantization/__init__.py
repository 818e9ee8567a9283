"""Few bits for weights, every zero left in place."""

from sparsify.params import QuantParams
from sparsify.quantization.codes import Quantized, dequantize
from sparsify.quantization.quantize import QuantResult, quantize_model
from sparsify.quantization.weight import quantize_weight

__all__ = [
    "QuantParams", "QuantResult", "Quantized", "dequantize", "quantize_model", "quantize_weight",
]  # fmt: skip
