"""Which weights may survive: N:M and unstructured patterns, keep masks, and the exact checker.

A keep mask is a boolean tensor of a weight's shape; True = survives, everywhere in this package.
Shape suffixes: O output features (rows), I input features (columns), G groups of a row, M columns
of a group. Knows tensors only, not models or methods.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sparsify.errors import InputError

_FORMS = "write N:M such as 2:4, or unstructured:S with 0 < S < 1 such as unstructured:0.5"

MAX_GROUP = 256


DENSE = "dense"
"""pattern of a model that was not pruned, such as one that only lost layers"""


@dataclass(frozen=True)
class Pattern:
    """N:M keeps n of every m consecutive input columns of each row; unstructured has n = m = 0.

    A dense model's is the unstructured one without a zero, which every weight fits.
    """

    n: int
    m: int
    sparsity: float
    """share of zeros: 1 - n/m, or what was asked for"""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4", "4:8", "1:2", "unstructured:0.5" or "dense".

        Raises:
            InputError: any other text, or numbers that prune nothing or everything.
        """
        if not isinstance(text, str):
            raise InputError(
                f"pattern: got {text!r} instead of text (YAML reads a bare 2:4 as a number); "
                'put it in quotes: "2:4"'
            )
        if text == DENSE:
            return cls(0, 0, 0.0)
        if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
            n, m = int(match[1]), int(match[2])
            if not 1 <= n < m <= MAX_GROUP:
                raise InputError(f"pattern {text!r}: N:M needs 1 <= N < M <= {MAX_GROUP}")
            return cls(n, m, 1 - n / m)
        if match := re.fullmatch(r"unstructured:(\d*\.?\d+(?:[eE]-?\d+)?)", text.strip()):
            sparsity = float(match[1])
            if not 0 < sparsity < 1:
                raise InputError(f"pattern {text!r}: the share of zeros must be between 0 and 1")
            return cls(0, 0, sparsity)
        raise InputError(f"pattern {text!r}: not a pattern; {_FORMS}")

    def __str__(self) -> str:
        if not self.sparsity:
            return DENSE
        return f"{self.n}:{self.m}" if self.is_structured else f"unstructured:{self.sparsity!r}"

    @property
    def is_structured(self) -> bool:
        """True for N:M, False for unstructured."""
        return self.m > 0

    def num_kept(self, num_columns: int) -> int:
        """Weights that survive in the first `num_columns` columns of a row (halves round up).

        For N:M, `num_columns` must be a multiple of m.
        """
        if self.is_structured:
            return num_columns // self.m * self.n
        return math.floor((1 - self.sparsity) * num_columns + 0.5)

    def most_kept(self, num_rows: int, num_columns: int) -> int:
        """Weights that may survive in a layer: those of all its rows, or the layer's own share
        where that rounds to more."""
        by_rows = num_rows * self.num_kept(num_columns)
        return (
            by_rows if self.is_structured else max(by_rows, self.num_kept(num_rows * num_columns))
        )


def check_divides(name: str, in_features: int, pattern: Pattern) -> None:
    """Refuse a layer whose rows cannot be cut into whole groups.

    Raises:
        InputError: m does not divide `in_features`; the message names the layer `name`.
    """
    if pattern.is_structured and in_features % pattern.m:
        raise InputError(
            f"{name}: {in_features} input columns cannot be cut into groups of {pattern.m} for "
            f"pattern {pattern}; leave the layer dense with prune.skip or use another pattern"
        )
