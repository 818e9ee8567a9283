"""What the job tokenize can be told; rules and help texts as in conf/schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.spec import ClusterSpec
from conf.options.data import DataConfig
from conf.options.model import ModelConfig
from sparsify.params import check_options, option


@dataclass
class TokenizeConfig:
    """The token store that is written."""

    out: str = option("runs/tokens", is_path=True)
    """folder of the store"""
    shard_bytes: int = option(128_000_000, low=1)
    """text per shard in bytes, about: the piece that one task does at a time, and loses when it is
    killed; it needs some ten times as much memory"""

    def __post_init__(self) -> None:
        check_options(self, "tokenize")


@dataclass
class TokenizeJobConfig:
    """Tokenise text once, for many recoveries (job tokenize)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
