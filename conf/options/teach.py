"""What the job teach can be told; rules and help texts as in conf/schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.spec import ClusterSpec
from conf.checks import half_needs_gpu
from conf.options.data import DataConfig
from conf.options.model import ModelConfig
from sparsify.errors import InputError
from sparsify.params import check_options, option


@dataclass
class TeachConfig:
    """The sample of a dense model's predictions that is written."""

    out: str = option("runs/teacher", is_path=True)
    """folder of the cache"""
    num_samples: int = option(16, low=1)
    """token ids drawn per token; the cache takes 8 bytes for each and 4 more per token"""
    temperature: float = option(1.0, above=0)
    """softmax temperature; the same as distill.temperature of the recoveries"""
    flatness: float = option(1.0, low=1)
    """1 draws ids as likely as the model has them; above, unlikely ones come more often and weigh
    less"""
    seed: int = option(0, low=0, high=2**63 - 1)
    """of the draws; same seed, same sample"""
    batch_size: int = option(8, low=1, speed_only=True)
    """rows per forward on one worker; changes memory and speed, and draws by rounding at most"""

    def __post_init__(self) -> None:
        check_options(self, "teach")


@dataclass
class TeachJobConfig:
    """Sample a dense model's predictions once, for many recoveries (job teach)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teach: TeachConfig = field(default_factory=TeachConfig)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)

    def __post_init__(self) -> None:
        half_needs_gpu(self.model.dtype, self.cluster)
        if self.data.train is None:
            raise InputError(
                "data.train: is required; give the token store of the recoveries, which "
                "python -m jobs.tokenize makes"
            )
