"""Options drop.*: layers that a model does without."""

from __future__ import annotations

from dataclasses import dataclass

from conf.checks import RULES
from sparsify.errors import InputError
from sparsify.params import as_list, check_options, option

PARTS = ("layers", "attention", "mlp")

NUM_ROWS = 128


@dataclass
class DropConfig:
    """Layers to drop: how many, or which."""

    rule: str = option("angular", one_of=RULES)
    """how layers are chosen: one file of sparsify/dropping"""
    num_layers: int | None = option(None, low=1)
    """layers to drop; of sublayers (drop.candidates), how many of them"""
    share: float | None = option(None, above=0, below=1)
    """share of the layers to drop, in place of drop.num_layers; at least one"""
    layers: list[int] = option([])
    """layers to drop, counted from 0, in place of a rule's choice"""
    candidates: list[str] = option(["layers"], one_of=PARTS)
    """what rule greedy chooses from: layers, attention, mlp; a sublayer is dropped by zeros in its
    last linear layer, which saves nothing unless both of a layer go"""
    num_rows: int | None = option(None, low=1)
    """calibration rows (of data.sequence_length tokens) of rules that run the model; null = 128"""
    batch_size: int = option(8, low=1, speed_only=True)
    """calibration rows per forward on one worker; changes memory and speed only"""

    def __post_init__(self) -> None:
        check_options(self, "drop")
        if not self.candidates:
            raise InputError(f"drop.candidates=[]: nothing to choose from; use some of "
                             f"{', '.join(PARTS)}")  # fmt: skip
        if len(set(self.layers)) < len(self.layers) or any(layer < 0 for layer in self.layers):
            raise InputError(
                f"drop.layers={as_list(self.layers)}: must be numbers from 0 on, each once"
            )

    @property
    def reads_rows(self) -> bool:
        """Whether calibration text is read."""
        return not self.layers and self.rule != "deepest"

    @property
    def rows(self) -> int:
        """Calibration rows to read; 0 for a rule that reads none."""
        return (self.num_rows or NUM_ROWS) if self.reads_rows else 0

    def require_whole(self) -> None:
        """Require one way to say what is dropped, and no option beside it that has no effect.

        Raises:
            InputError: there is none, or an option has none.
        """
        asked = {
            "drop.num_layers": self.num_layers, "drop.share": self.share,
            "drop.layers": as_list(self.layers) if self.layers else None,
        }  # fmt: skip
        given = [f"{name}={value}" for name, value in asked.items() if value is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)}: more than one of them" if given else (
                "drop.num_layers: nothing says what to drop"
            )  # fmt: skip
            raise InputError(f"{found}; give one of drop.num_layers, drop.share, drop.layers")
        why = f"drop.layers={as_list(self.layers)}" if self.layers else f"drop.rule={self.rule}"
        idle = []
        if self.layers and self.rule != DropConfig.rule:
            idle.append(f"drop.rule={self.rule}")
        if self.candidates != ["layers"] and (self.layers or self.rule != "greedy"):
            idle.append(f"drop.candidates={as_list(self.candidates)}")
        if self.num_rows is not None and not self.reads_rows:
            idle.append(f"drop.num_rows={self.num_rows}")
        if idle:
            raise InputError(f"{' and '.join(idle)}: has no effect with {why}; leave it out")

    def num_dropped(self, num_layers: int) -> int:
        """Units to drop of a model of so many layers.

        Raises:
            InputError: there are not so many, or nothing would be left.
        """
        if self.layers:
            beyond = [layer for layer in self.layers if layer >= num_layers]
            if beyond:
                raise InputError(
                    f"drop.layers={as_list(self.layers)}: the model has layers 0 to "
                    f"{num_layers - 1}; leave out {', '.join(map(str, beyond))}"
                )
            wanted, most = len(self.layers), num_layers
            field = f"drop.layers={as_list(self.layers)}"
        else:
            most = num_layers * (1 if "layers" in self.candidates else len(self.candidates))
            wanted = self.num_layers or max(1, round((self.share or 0) * most))
            field = f"drop.num_layers={self.num_layers}" if self.num_layers else (
                f"drop.share={self.share}"
            )  # fmt: skip
        if wanted >= most:
            what = "layers" if "layers" in self.candidates else "sublayers"
            raise InputError(
                f"{field}: the model has {most} {what} and one of them must stay; drop at most "
                f"{most - 1}"
            )
        return wanted
