"""Options quantize.*: few bits, with every zero in place."""

from __future__ import annotations

from dataclasses import dataclass

from conf.checks import SCHEMES
from sparsify.params import QuantParams, option


@dataclass
class QuantizeConfig(QuantParams):
    """Low-bit weights that leave every zero where it is."""

    scheme: str = option(QuantParams.scheme, one_of=SCHEMES)
    """int4, int8 (W8A16), w8a8 (int8, as engines run it with int8 activations), fp8 (e4m3) or nf4:
    one file of sparsify/quantization/schemes"""
    one_pass: bool = option(False)
    """quantise each layer as soon as it is pruned, in the walk of the stage prune and with its
    calibration rows; not with a recovery between the two"""
    num_samples: int = option(256, low=1)
    """calibration rows (of data.sequence_length tokens)"""
    damping: float = option(QuantParams.damping, above=0, high=1)
    """share of the Hessian's mean diagonal added to its diagonal; over 0, at most 1"""
    batch_size: int = option(8, low=1, speed_only=True)
    """calibration rows per forward on one worker; changes memory and speed only"""
    attention: str = option("auto", one_of=("auto", "varlen", "masked"), speed_only=True)
    """over rows of several documents: varlen (within each document), masked (over the whole row) or
    auto: varlen where a GPU has a kernel for it and the model computes the same with it"""
    skip: list[str] = option([])
    """glob patterns of pruned layers whose values stay as they are, such as [*.down_proj]"""
    reduction: str = option("fast", one_of=("fast", "fixed"))
    """order of sums over workers: fast, or fixed (same bits with 1, 2, 4 or 8 workers)"""
    activations: str = option("auto", one_of=("auto", "device", "host", "disk"), speed_only=True)
    """where hidden states wait between blocks: auto, device, host or disk"""
    checkpoint_every_blocks: int = option(1, low=1, speed_only=True)
    """blocks between two states that a killed run can resume from"""

    def unused(self) -> list[str]:
        """Options that were set and that have no effect, as `quantize.NAME=VALUE`.

        They are of a walk of its own, and `one_pass` has none.
        """
        names = _OF_OWN_WALK if self.one_pass else ()
        default = QuantizeConfig()
        found = {name: getattr(self, name) for name in names}
        return [f"quantize.{n}={v}" for n, v in found.items() if v != getattr(default, n)]


_OF_OWN_WALK = (
    "num_samples", "teacher_share", "batch_size", "attention", "reduction", "activations",
    "checkpoint_every_blocks",
)  # fmt: skip
