"""Options quantize.*: integers with every zero in place."""

from __future__ import annotations

from dataclasses import dataclass

from conf import checks as rules


@dataclass
class QuantizeConfig:
    """Low-bit weights that leave every zero where it is."""

    method: str = "gptq"
    """gptq (error carried to later columns) or rtn (round to nearest, no calibration)"""
    bits: int = 4
    """bits per kept weight: 4 or 8"""
    group_size: int = 128
    """consecutive columns of a row that share one scale"""
    num_samples: int = 256
    """calibration rows (of data.sequence_length tokens)"""
    damping: float = 0.01
    """share of the Hessian's mean diagonal added to its diagonal; over 0, at most 1"""
    batch_size: int = 8
    """calibration rows per forward on one worker; changes memory and speed only"""

    def __post_init__(self) -> None:
        rules.one_of("quantize.method", self.method, ("gptq", "rtn"))
        rules.one_of("quantize.bits", self.bits, (4, 8))
        for name in ("group_size", "num_samples", "batch_size"):
            rules.in_range(f"quantize.{name}", getattr(self, name), low=1)
        rules.in_range("quantize.damping", self.damping, above=0, high=1)
