"""Options finetune.*: learning a task with the zeros held."""

from __future__ import annotations

from dataclasses import dataclass, fields

from conf.options.distill import DistillConfig, as_distillation
from conf.options.training import TrainingConfig
from sparsify.errors import InputError
from sparsify.params import check_options, option


@dataclass
class FinetuneConfig(TrainingConfig):
    """Fine-tuning on records of conversations or on text, the zeros held."""

    data: str | None = None
    """records (messages, prompt and completion, Alpaca, ShareGPT) or text; null = data.train"""
    heldout: str | None = None
    """records scored every heldout_every_steps; null = of text what data.heldout says, else none"""
    fields: list[str] = option([])
    """columns under other names: NAME:COLUMN, such as [prompt:question,completion:answer]"""
    template: str | None = option(None)
    """chat template: a Jinja file, raw (contents in a row) or alpaca; null = the model's own"""
    packing: bool = True
    """several records in a row, apart from each other; false = one a row, the rest filled up"""
    epochs: float = option(1.0, above=0)
    """times that every record is used"""
    num_tokens: int | None = option(None, low=1)
    """tokens to train on, required for text; null = those of the epochs"""
    teacher: str | None = option(None, is_path=True)
    """dense fine-tuned model to learn from, by kl_weight or square_head_weight; null = none"""
    adapter: str = option("none", one_of=("none", "lora", "qlora"))
    """what is trained: all weights (none), LoRA beside them (lora) or beside 4-bit ones (qlora)"""
    merge: str = option("masked", one_of=("masked", "at_merge"))
    """where adapters meet the masks: in every forward pass, so that what is merged is what was
    trained (masked), or plain LoRA that the merge cuts (at_merge)"""
    rank: int = option(16, low=1)
    """rank of the adapters"""
    alpha: float = option(32.0, above=0)
    """adapters are multiplied by alpha / rank"""
    targets: list[str] = option(["*"])
    """globs of the blocks' linear layers that get adapters, such as [*.mlp.*]"""
    adapter_from: str | None = option(None, is_path=True)
    """folder of LoRA adapters of this model to start from; null = new ones"""
    optimizer: str | None = option(None, one_of=("adamw", "paged_adamw"))
    """adamw, or one whose moments may leave a full GPU (adapters alone); null = paged with qlora"""
    learning_rate: float = option(1e-4, above=0)
    """peak learning rate, after warm-up"""
    min_learning_rate_share: float = option(0.0, low=0, high=1)
    """learning rate at the end as a share of the peak; 0 to 1"""
    kl_weight: float = option(0.0, low=0)
    """weight of KL(teacher || student) on the logits"""
    ce_weight: float = option(1.0, low=0)
    """weight of cross-entropy with the answers' tokens"""

    def __post_init__(self) -> None:
        check_options(self, "finetune")
        self._check_adapter()
        self.training(1)

    def check_teacher(self) -> None:
        """Require a teacher if a term of the loss compares with one, else none; InputError."""
        named = ("kl_weight", "reverse_kl_weight", "square_head_weight")
        losses = self.training(1).losses()
        asked = [name for name in named if losses.peak(name.removesuffix("_weight")) > 0]
        if asked and self.teacher is None:
            raise InputError(
                f"finetune.{asked[0]}: compares with a teacher and there is none; give a dense "
                "fine-tuned model with finetune.teacher=FOLDER, or set the weight to 0"
            )
        if self.teacher is not None and not asked:
            raise InputError(
                f"finetune.teacher={self.teacher}: nothing is learned from it while "
                f"{' and '.join(f'finetune.{name}=0' for name in named)}; set one of them, such as "
                "finetune.square_head_weight=1"
            )

    @property
    def is_paged(self) -> bool:
        """Whether the optimizer's moments may leave the GPU."""
        return self.optimizer == "paged_adamw" or (
            self.optimizer is None and self.adapter == "qlora"
        )

    def _check_adapter(self) -> None:
        usual = {item.name: item for item in fields(self)}
        if self.adapter == "none":
            for name in ("merge", "rank", "alpha", "targets", "adapter_from", "optimizer"):
                value, item = getattr(self, name), usual[name]
                if value != (["*"] if name == "targets" else item.default):
                    raise InputError(
                        f"finetune.{name}={value}: is for adapters, and finetune.adapter=none "
                        "trains all weights; use finetune.adapter=lora or qlora, or leave it out"
                    )
            return
        if not self.targets:
            raise InputError("finetune.targets=[]: no layer would get an adapter; use [*]")
        for name, value in (("zero_stage", 3), ("offload_optimizer", True), ("compile", True)):
            if getattr(self, name) == value:
                raise InputError(
                    f"finetune.{name}={str(value).lower()} with finetune.adapter={self.adapter}: "
                    "every worker holds the frozen model whole, as it is, and adapters are small; "
                    "leave it out"
                )
        if self.merge == "masked" and self.recompute == "elementwise" and self.recompute_share:
            raise InputError(
                f"finetune.recompute=elementwise with finetune.adapter={self.adapter} and "
                "finetune.merge=masked: every layer's merged weight would be kept, as a product; "
                "use finetune.recompute=whole"
            )

    def training(self, num_tokens: int) -> DistillConfig:
        """The same as options of the engine, which checks them too.

        Raises:
            InputError: a rule of training is broken; names finetune's option.
        """
        if self.adapter == "none":
            return as_distillation(self, "finetune", num_tokens)
        # Adapters are float32 beside weights of any type: their own masters.
        teacher_dtype = self.teacher_dtype or ("bfloat16" if self.precision == "bf16" else None)
        return as_distillation(
            self, "finetune", num_tokens, precision="fp32", teacher_dtype=teacher_dtype
        )
