"""Options export.*: the folders to deploy."""

from __future__ import annotations

from dataclasses import dataclass

from conf import checks as rules


@dataclass
class ExportConfig:
    """The files to deploy."""

    dtype: str | None = None
    """type of the exported weights: float32, bfloat16 or float16; null = as trained"""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            rules.one_of("export.dtype", self.dtype, rules.DTYPES)
