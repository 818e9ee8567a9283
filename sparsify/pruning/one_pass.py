"""Layers that are quantised as soon as they are pruned, in the same walk.

The layers behind are then calibrated on what the quantised ones put out, as in a walk of its own
over the pruned model, and the hidden states, the Hessians and the blocks on disk are had once.
What cannot be between the two is a recovery.
Shape suffixes: O output features (rows), I input features, R rows of this process. Of a stack of
layers all tensors have a leading dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from sparsify.calibration.hessian import row_energies
from sparsify.calibration.layers import Layer, skipped_linears
from sparsify.comm import Comm
from sparsify.masks.storage import mask_from_bits
from sparsify.methods import Solution
from sparsify.packed.layer import Codes, pack_layer
from sparsify.params import QuantParams
from sparsify.pattern import Pattern
from sparsify.quantization.codes import Quantized
from sparsify.quantization.quantize import gathered, joined
from sparsify.quantization.weight import KnownInputs, quantize_rows
from sparsify.tensors import METADATA, write_tensors

FOLDER = "codes"
"""of a pruning's folder: its layers as they are packed, a file a block"""


class OnePass:
    """The quantiser of one walk that prunes.

    Args:
        params: scheme, method and numbers.
        skip: glob patterns of pruned layers whose values stay as they are.
    """

    def __init__(self, params: QuantParams, skip: Sequence[str] = ()) -> None:
        self._params = params
        self._skip = skip
        self._skipped: set[str] = set()
        self._inputs = KnownInputs(params, has_teacher=False)
        self._parts: list[Quantized] = []
        self._energy: Tensor | None = None
        self._codes: dict[str, Codes] = {}

    def check(self, model: nn.Module) -> None:
        """Look for the layers to be skipped.

        Raises:
            InputError: a glob names none.
        """
        self._skipped = skipped_linears(model, self._skip, "quantize.skip")

    def skips(self, layer: Layer) -> bool:
        """Whether a layer's values stay as they are."""
        return layer.name in self._skipped

    def begin(self, layers: Sequence[Layer]) -> None:
        """A layer or stack comes next, as a whole or in parts."""
        self._inputs.begin(layers)

    def solve(self, layers: Sequence[Layer], hessian_II: Tensor, solution: Solution) -> Solution:
        """Some rows of a layer or stack with the values that their codes stand for.

        Its target are the pruned weights, which make up for those that are gone; what rounding
        costs goes to the surviving ones.

        Args:
            layers: of those begun, all or none of which are skipped.
            hessian_II: of the layer, or of each.
            solution: their pruned rows.

        Raises:
            NonFiniteError, InputError, SingularHessianError: see `quantize_weight`.
        """
        if self.skips(layers[0]):
            return solution
        inputs, names = self._inputs.of(layers), [layer.name for layer in layers]
        found = quantize_rows(
            solution.weight_OI, solution.keep_mask_OI, inputs, self._params, names
        )
        change_RI = (solution.weight_OI - found.weight_OI).to(hessian_II.dtype)
        energy = row_energies(change_RI, hessian_II).sum(-1).double()
        self._energy = energy if self._energy is None else self._energy + energy
        self._parts.append(found)
        return replace(solution, weight_OI=found.weight_OI)

    def finish(self, layers: Sequence[Layer], comm: Comm, num_rows: int) -> list[float | None]:
        """Gather the codes of all processes' rows; called once a layer or stack, on every process.

        Returns:
            Of each tr((Z - Q) H (Z - Q)^T), what rounding the pruned weights Z costs; None where
            layers are skipped.
        """
        if self.skips(layers[0]):
            return [None] * len(layers)
        parts, energy = self._parts, self._energy
        self._parts, self._energy = [], None
        assert energy is not None, "every process solves rows of a layer, if none of them"
        comm.all_reduce_(energy)
        codes = gathered(joined(parts).codes, comm, num_rows)
        self._codes.update(zip((layer.name for layer in layers), codes, strict=True))
        return energy.view(-1).tolist()

    def take_block(self) -> dict[str, Codes]:
        """Codes of the layers since the last call; forgets them, and the block's inputs."""
        self._inputs.forget()
        codes, self._codes = self._codes, {}
        return codes


def write_codes(
    path: Path, codes: Mapping[str, Codes], tensors: Mapping[str, Tensor],
    bits: Mapping[str, tuple[Tensor, tuple[int, int]]], pattern: Pattern,
) -> None:  # fmt: skip
    """Write the packed layers of a block.

    Args:
        path: of the file.
        codes: of the layers.
        tensors: of the block, with the values of the codes.
        bits: layer name -> its mask as bits, and its shape.
        pattern: of the masks.
    """
    packed: dict[str, Tensor] = {}
    for name, found in codes.items():
        keep_OI = mask_from_bits(*bits[name])
        _, parts = pack_layer(name, tensors[f"{name}.weight"], keep_OI, pattern, found)
        packed |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, packed, METADATA)
