"""What the job teach can be told; rules and help texts as in conf/schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.spec import ClusterSpec
from conf import checks as rules
from conf.options.data import DataConfig
from conf.options.model import ModelConfig
from sparsify.errors import InputError


@dataclass
class TeachConfig:
    """The sample of a dense model's predictions that is written."""

    out: str = "runs/teacher"
    """folder of the cache"""
    num_samples: int = 16
    """token ids drawn per token; the cache takes 8 bytes for each and 4 more per token"""
    temperature: float = 1.0
    """softmax temperature; the same as distill.temperature of the recoveries"""
    flatness: float = 1.0
    """1 draws ids as likely as the model has them; above, unlikely ones come more often and weigh
    less"""
    seed: int = 0
    """of the draws; same seed, same sample"""
    batch_size: int = 8
    """rows per forward on one worker; changes memory and speed, and draws by rounding at most"""

    def __post_init__(self) -> None:
        rules.not_blank("teach.out", self.out)
        for name in ("num_samples", "batch_size"):
            rules.in_range(f"teach.{name}", getattr(self, name), low=1)
        rules.in_range("teach.temperature", self.temperature, above=0)
        rules.in_range("teach.flatness", self.flatness, low=1)
        rules.in_range("teach.seed", self.seed, low=0, high=2**63 - 1)


@dataclass
class TeachJobConfig:
    """Sample a dense model's predictions once, for many recoveries (job teach)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teach: TeachConfig = field(default_factory=TeachConfig)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)

    def __post_init__(self) -> None:
        rules.half_needs_gpu(self.model.dtype, self.cluster)
        if self.data.train is None:
            raise InputError(
                "data.train: is required; give the token store of the recoveries, which "
                "python -m jobs.tokenize makes"
            )
