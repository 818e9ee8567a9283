"""Options export.*: the folders to deploy."""

from __future__ import annotations

from dataclasses import dataclass

from conf.checks import DTYPES, FORMATS
from sparsify.errors import InputError
from sparsify.params import check_options, option


@dataclass
class ExportConfig:
    """The files to deploy."""

    formats: list[str] = option(["dense", "packed"], one_of=FORMATS)
    """what to write: dense (zeros stored, loads everywhere), packed (no zeros),
    compressed-tensors (the quantised model for stock engines, zeros stored)"""
    dtype: str | None = option(None, one_of=DTYPES)
    """type of the exported weights: float32, bfloat16 or float16; null = as trained"""
    shard_size_gb: float = option(5.0, above=0)
    """a weight file holds at most so many GB, or one tensor"""
    max_timed_gb: float = option(4.0, low=0)
    """how fast the folders answer is timed for dense weights up to so many GB"""

    def __post_init__(self) -> None:
        check_options(self, "export")
        if not self.formats:
            raise InputError(
                f"export.formats=[]: nothing to write; name some of {', '.join(FORMATS)}"
            )
