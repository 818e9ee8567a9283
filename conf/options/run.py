"""Options run.*: where a run is, what it starts from, and the stages there are."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf import checks as rules
from sparsify.errors import InputError

STAGES = ("prune", "distill", "evaluate", "quantize", "export", "report")
"""Every stage, in the only order in which stages run."""


@dataclass
class RunConfig:
    """Where the run lives and what it starts from."""

    dir: str | None = None
    """run folder; null = runs/<model name>-<pattern>-<method>"""
    from_: str | None = None
    """what to start from: an earlier run, one of its stage folders, or a model folder"""
    seed: int = 0
    """orders calibration and training rows; same seed, same result"""
    redo: list[str] = field(default_factory=list)
    """stages to run again though their results could be reused, or [all]"""

    def __post_init__(self) -> None:
        rules.in_range("run.seed", self.seed, low=0, high=2**63 - 1)
        rules.not_blank("run.dir", self.dir, optional=True)
        rules.not_blank("run.from", self.from_, optional=True)
        rules.no_duplicates("run.redo", self.redo)
        for name in self.redo:
            rules.one_of("run.redo", name, (*STAGES, "all"))
        if "all" in self.redo and len(self.redo) > 1:
            raise InputError(
                f"run.redo={rules.as_list(self.redo)}: 'all' stands alone; use run.redo=[all]"
            )
