"""Options pretrain.*: a dense model from random weights."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from conf.checks import nearest_multiples
from conf.options.distill import DistillConfig, as_distillation
from conf.options.training import TrainingConfig
from sparsify.errors import InputError
from sparsify.params import as_list, check_options, option

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
    "tie_embeddings",
)  # fmt: skip

_OF_A_TEACHER = (
    "kl_weight", "reverse_kl_weight", "square_head_weight", "temperature", "schedule",
    "teacher_placement", "teacher_dtype",
)  # fmt: skip

USUAL_VOCABULARY = 1024


@dataclass
class PretrainConfig(TrainingConfig):
    """Training of a dense model from random weights, by cross-entropy alone."""

    num_tokens: int = option(44_040_192, low=1)
    """tokens to train on; text with fewer is used several times"""
    config: str | None = option(None, is_path=True)
    """folder with config.json of a causal language model, and its tokenizer, which is trained on
    the text where there is none; null = a Llama of the sizes below"""
    tokenizer: str | None = option(None, is_path=True)
    """folder of a tokenizer; null = that of pretrain.config, else one trained on the text"""
    vocab_size: int | None = option(None, low=257)
    """tokens of the vocabulary; null = those of the tokenizer, 1024 where one is trained"""
    hidden_size: int = option(128, low=1)
    """width of the model"""
    intermediate_size: int = option(256, low=1)
    """width of the feed-forward part"""
    num_layers: int = option(4, low=1)
    """decoder blocks"""
    num_heads: int = option(4, low=1)
    """attention heads; divides hidden_size into heads of even width"""
    num_kv_heads: int = option(2, low=1)
    """key and value heads; divides num_heads"""
    tie_embeddings: bool = True
    """the output layer's weights are those of the embedding"""
    batch_size: int = option(32, low=1)
    """rows per optimizer step over all workers"""
    learning_rate: float = option(3e-3, above=0)
    """peak learning rate, after warm-up"""
    min_learning_rate_share: float = option(0.0, low=0, high=1)
    """learning rate at the end as a share of the peak; 0 to 1"""
    num_warmup_steps: int = option(100, low=0)
    """steps of linear warm-up"""
    weight_decay: float = option(0.1, low=0)
    """decoupled weight decay of matrices"""
    kl_weight: float = option(0.0, low=0)
    """weight of KL(teacher || student): 0, for there is no teacher"""
    ce_weight: float = option(1.0, above=0)
    """weight of cross-entropy with the next token"""

    def __post_init__(self) -> None:
        check_options(self, "pretrain")
        changed = {f.name for f in fields(self) if getattr(self, f.name) != _usual(f)}
        for name in _OF_A_TEACHER:
            if name in changed:
                value = getattr(self, name)
                shown = as_list(value) if isinstance(value, list) else value
                raise InputError(
                    f"pretrain.{name}={shown}: there is no teacher; leave it out, "
                    "or use python -m jobs.distill or jobs.finetune"
                )
        for name in _SIZES:
            if self.config is not None and name in changed:
                raise InputError(
                    f"pretrain.{name}={getattr(self, name)} with pretrain.config={self.config}: "
                    "sizes are those of its config.json; leave one of the two out"
                )
        _heads_fit(self.hidden_size, self.num_heads, self.num_kv_heads)
        self.training()

    def training(self) -> DistillConfig:
        """The same as options of the engine, which checks them too; InputError names pretrain's."""
        return as_distillation(self, "pretrain", self.num_tokens)


def _usual(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _heads_fit(hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
    """Require heads of equal, even width (rotary positions pair columns) and equal groups."""
    unit = 2 * num_heads
    if hidden_size % unit:
        raise InputError(
            f"pretrain.hidden_size={hidden_size} with pretrain.num_heads={num_heads}: the width "
            f"must be a multiple of {unit} = 2 x heads; use pretrain.hidden_size="
            f"{nearest_multiples(hidden_size, unit)}"
        )
    if num_heads % num_kv_heads:
        fitting = ", ".join(str(k) for k in range(1, num_heads + 1) if num_heads % k == 0)
        raise InputError(
            f"pretrain.num_kv_heads={num_kv_heads} with pretrain.num_heads={num_heads}: must "
            f"divide it; use one of {fitting}"
        )
