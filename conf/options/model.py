"""Options model.*: the model to make sparse."""

from __future__ import annotations

from dataclasses import dataclass

from conf.checks import DTYPES
from sparsify.params import check_options, option


@dataclass
class ModelConfig:
    """The model to make sparse."""

    path: str = "embedded"
    """model folder in Hugging Face layout (safetensors), or 'embedded' for the packaged one"""
    teacher: str | None = None
    """dense model to learn from and compare with; null = model.path, or what run.from came from"""
    dtype: str = option("float32", one_of=DTYPES)
    """type the weights are held in: float32, bfloat16 or float16"""

    def __post_init__(self) -> None:
        check_options(self, "model")
