"""Options run.*: where a run is, what it starts from, and the stages there are."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.errors import InputError
from sparsify.params import as_list, check_options, option

STAGES = (
    "pretrain", "drop", "prune", "distill", "finetune", "evaluate", "quantize", "export", "report",
)  # fmt: skip
"""Every stage, in the only order in which stages run."""

ASKED = ("pretrain", "drop", "finetune")
"""stages that run only where `stages` names them"""

USUAL = tuple(name for name in STAGES if name not in ASKED)
"""the others"""


@dataclass
class RunConfig:
    """Where the run lives and what it starts from."""

    dir: str | None = option(None, is_path=True)
    """run folder; null = runs/<model name>-<pattern>-<method>"""
    from_: str | None = option(None, is_path=True)
    """what to start from: an earlier run, one of its stage folders, or a model folder"""
    recipe: str | None = option(None, is_path=True)
    """recipe of SparseML or llm-compressor (YAML), or recipe.yaml of an earlier model: its
    modifiers are options, over which those that are given win"""
    seed: int = option(0, low=0, high=2**63 - 1)
    """orders calibration and training rows; same seed, same result"""
    redo: list[str] = option([], one_of=(*STAGES, "all"))
    """stages to run again though their results could be reused, or [all]"""
    until: str | None = option(None, one_of=STAGES)
    """stage after which to stop; the same command without it goes on from there"""

    def __post_init__(self) -> None:
        check_options(self, "run")
        if "all" in self.redo and len(self.redo) > 1:
            raise InputError(
                f"run.redo={as_list(self.redo)}: 'all' is given alone; use run.redo=[all]"
            )
