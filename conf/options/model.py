"""Options model.*: the model to make sparse."""

from __future__ import annotations

import re
from dataclasses import dataclass

from conf.checks import DTYPES
from sparsify.params import check_options, option

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)
"""A model of the Hugging Face Hub, where there is no such folder"""


@dataclass
class ModelConfig:
    """The model to make sparse."""

    path: str = option("embedded", is_path=True)
    """model folder in Hugging Face layout (safetensors); ORGANISATION/NAME[@REVISION] of the
    Hugging Face Hub; or 'embedded' for the packaged model"""
    teacher: str | None = option(None, is_path=True)
    """dense model to learn from and compare with, as in model.path; null = model.path, or what
    run.from came from"""
    dtype: str = option("float32", one_of=DTYPES)
    """type the weights are held in: float32, bfloat16 or float16"""

    def __post_init__(self) -> None:
        check_options(self, "model")
