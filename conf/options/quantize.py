"""Options quantize.*: integers with every zero in place."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.params import QUANT_METHODS, QuantParams, check_options, option


@dataclass
class QuantizeConfig:
    """Low-bit weights that leave every zero where it is."""

    method: str = option(QuantParams.method, one_of=QUANT_METHODS)
    """gptq (error carried to later columns) or rtn (round to nearest, no calibration)"""
    bits: int = option(QuantParams.bits, one_of=(4, 8))
    """bits per kept weight: 4 or 8"""
    group_size: int = option(QuantParams.group_size, low=1)
    """consecutive columns of a row that share one scale"""
    num_samples: int = option(256, low=1)
    """calibration rows (of data.sequence_length tokens)"""
    damping: float = option(QuantParams.damping, above=0, high=1)
    """share of the Hessian's mean diagonal added to its diagonal; over 0, at most 1"""
    batch_size: int = option(8, low=1, speed_only=True)
    """calibration rows per forward on one worker; changes memory and speed only"""

    def __post_init__(self) -> None:
        check_options(self, "quantize")
