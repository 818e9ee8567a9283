"""What the job tokenize can be told; rules and help texts as in conf/schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.spec import ClusterSpec
from conf import checks as rules
from conf.options.data import DataConfig
from conf.options.model import ModelConfig


@dataclass
class TokenizeConfig:
    """The token store that is written."""

    out: str = "runs/tokens"
    """folder of the store"""
    shard_bytes: int = 128_000_000
    """text per shard in bytes, about: the piece that one task does at a time, and loses when it is
    killed; it needs some ten times as much memory"""

    def __post_init__(self) -> None:
        rules.not_blank("tokenize.out", self.out)
        rules.in_range("tokenize.shard_bytes", self.shard_bytes, low=1)


@dataclass
class TokenizeJobConfig:
    """Tokenise text once, for many recoveries (job tokenize)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
