"""Options export.*: the folders to deploy."""

from __future__ import annotations

from dataclasses import dataclass

from conf.checks import DTYPES
from sparsify.params import check_options, option


@dataclass
class ExportConfig:
    """The files to deploy."""

    dtype: str | None = option(None, one_of=DTYPES)
    """type of the exported weights: float32, bfloat16 or float16; null = as trained"""

    def __post_init__(self) -> None:
        check_options(self, "export")
