"""Adapters on a frozen model: the only importer of peft and bitsandbytes.

Builds the student whose layers have adapters (`sparsify.adapters`), its weights whole or as NF4
with double quantisation, and merges, writes and reads adapters. peft writes and reads the folders,
so that others can load them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import bitsandbytes
import peft
import torch
from peft.utils import load_peft_weights
from torch import Tensor, nn

from cluster.runtime.worker import WorkerContext
from conf.options.finetune import FinetuneConfig
from conf.schema import Config
from jobs.training.optimizer import Gated
from jobs.training.student import Student, flops_of, open_blocks, prove
from sparsify.adapters.lora import LowRank, adapters_of, attach, cut_share, freeze, merged
from sparsify.data.order import key_of
from sparsify.errors import InputError, first_line
from sparsify.files import write_json
from sparsify.formats.sparse_folder import model_fingerprint
from sparsify.formats.verify import own_masks
from sparsify.masks.storage import BitMasks
from sparsify.models.load import build_model, check_vocabulary, load_model, load_tokenizer
from sparsify.models.masked import apply_masks_, infer_block_masks
from sparsify.models.structure import linears_of
from sparsify.models.training import prepare_student, recompute_layers

Pair = tuple[Tensor, Tensor]
"""A (r, I) and B (O, r) of a layer"""

_WEIGHTS, _FACTS = "adapter_model.safetensors", "sparse.json"


class PagedAdamW(Gated, bitsandbytes.optim.PagedAdamW32bit):
    """bitsandbytes' AdamW whose moments may leave the GPU for host memory when it is full.

    On a CPU bitsandbytes warns, and pages nothing.
    """

    moment_names: ClassVar[dict[str, str]] = {"exp_avg": "state1", "exp_avg_sq": "state2"}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, or none."""
        return super().step(closure) if self.is_due() else None

    def make_state(self, flat_params: Iterable[Any]) -> None:
        """The state before the first step, of all parameters."""
        for gindex, group in enumerate(self.param_groups):
            for pindex, param in enumerate(group["params"]):
                self.init_state(group, param, gindex, pindex)

    def set_num_updates(self, count: int) -> None:
        """How many steps it has made, for the correction of its moments."""
        for entry in self.state.values():
            entry["step"] = count


def load_adapted(
    folder: Path, keeps_all: bool, config: Config, context: WorkerContext, given: Path | None
) -> Student:
    """The frozen model with adapters, ready for the engine; nothing else of it is trained.

    With `finetune.adapter=qlora` the weights of the blocks' linear layers are NF4: read block by
    block where the checkpoint can be, quantised on the device, and given back layer by layer when
    they are multiplied with. Exact zeros are exact zeros in NF4 too.

    Args:
        folder: of the model.
        keeps_all: whether it is dense, without masks.
        config: of the run, its engine's options those of the stage.
        context: this worker.
        given: folder of adapters to start from; None draws new ones.

    Raises:
        InputError: see `prove`, `infer_block_masks` and `read_adapters`; or a glob that names no
            layer.
    """
    settings, engine = config.finetune, config.distill
    dtype = "bfloat16" if settings.precision == "bf16" else "float32"
    in_4_bits = settings.adapter == "qlora"
    source = open_blocks(folder, dtype, context, in_4_bits, "finetune.adapter=qlora")
    model: Any = source.model
    check_vocabulary(model, load_tokenizer(folder), str(folder))
    flops = flops_of(model, context)
    model.requires_grad_(False)
    prepare_student(model)
    recompute_layers(model, engine.recompute_share, engine.recompute)
    masks, pattern = own_masks(folder, config.prune.pattern)
    start = {} if given is None else read_adapters(given, model_fingerprint(folder))
    found, held = None, {}
    for index in range(len(source.blocks)):
        block = source.open(index).requires_grad_(False)
        found = found or prove(source, settings, config.data.isolate_documents, context)
        prefix = f"{source.list_name}.{index}"
        own: Mapping[str, Tensor] = {}
        if masks is not None:
            own = masks.within(prefix)
        elif not keeps_all:
            own = infer_block_masks(prefix, block, pattern, config.prune.skip)
        apply_masks_(model, own)
        held.update({name: own[name] for name in own})
        for relative, linear in linears_of(block).items():
            name = f"{prefix}.{relative}"
            is_chosen = any(
                fnmatchcase(name, glob) or fnmatchcase(relative, glob) for glob in settings.targets
            )
            given_pair = start.pop(name, None) if is_chosen else None
            _adapt(linear, name, own.get(name), is_chosen, config, given_pair)
    if start:
        raise InputError(
            f"finetune.adapter_from={given}: has an adapter of {min(start)}, and the model no such "
            "layer among finetune.targets; they are of different models"
        )
    if not adapters_of(model):
        raise InputError(
            f"finetune.targets={settings.targets}: names no linear layer of the blocks; names look "
            f"like {source.list_name}.0.{next(iter(linears_of(source.blocks[0])))}"
        )
    assert found is not None, "a list of blocks is never empty"
    return Student(model, found, BitMasks.of(held), pattern, None, flops)


def _adapt(
    linear: nn.Linear, name: str, keep_mask: Tensor | None, is_chosen: bool, config: Config,
    start: Pair | None,
) -> None:  # fmt: skip
    """Give a layer its adapter if it is chosen, and its weight the form that it is kept in."""
    settings = config.finetune
    weight = _in_nf4(linear) if settings.adapter == "qlora" else None
    if is_chosen:
        generator = torch.Generator().manual_seed(key_of("adapter", config.run.seed, name))
        adapter = LowRank(
            linear, settings.rank, settings.alpha, keep_mask, settings.merge, weight, generator
        )
        if start is not None:
            _start(adapter, name, start)
        attach(linear, adapter)
    elif weight is not None:
        freeze(linear, weight)
    if weight is not None:
        linear._parameters["weight"] = None


def _start(adapter: LowRank, name: str, start: Pair) -> None:
    for param, values in zip((adapter.down_RI, adapter.up_OR), start, strict=True):
        if param.shape != values.shape:
            raise InputError(
                f"finetune.adapter_from: {name} has an adapter of shape {tuple(values.shape)}, and "
                f"here it is {tuple(param.shape)}; they are of different models, or finetune.rank "
                "is another"
            )
        param.data.copy_(values)


def _in_nf4(linear: nn.Linear) -> Any:
    """The layer's weight in 4 bits, as what gives it back in its own type."""
    quantize, back = bitsandbytes.functional.quantize_4bit, bitsandbytes.functional.dequantize_4bit
    packed, state = quantize(linear.weight.data, quant_type="nf4", compress_statistics=True)
    return lambda: back(packed, state)


@dataclass(frozen=True)
class Merge:
    """A model with its adapters merged, and what that changed."""

    model: Any
    """on the CPU, in the type that it was trained in"""
    cut_share: float | None
    """of the adapters' change, by its squared norm: what lay outside the masks; None: nothing can,
    for the masks were in the forward pass"""


def merge_adapters(
    folder: Path, masks: BitMasks, adapters: Mapping[str, LowRank], settings: FinetuneConfig
) -> Merge:
    """The model of a folder with adapters merged under its masks: added in float32, then cast.

    After QLoRA the weights are those of the folder, not what 4 bits made of them.

    Args:
        folder: that the adapters were trained on.
        masks: its keep masks; none for a dense model.
        adapters: full layer name -> trained adapter.
        settings: of the fine-tuning.
    """
    model = load_model(folder, "bfloat16" if settings.precision == "bf16" else "float32")
    apply_masks_(model, masks)
    cut, total = 0.0, 0.0
    for name, adapter in adapters.items():
        linear: Any = model.get_submodule(name)
        down, up = (one.detach().cpu() for one in (adapter.down_RI, adapter.up_OR))
        keep_mask = masks.get(name)
        linear.weight.data = merged(linear.weight.data, down, up, adapter.scale, keep_mask)
        if keep_mask is not None and adapter.way == "at_merge":
            norm = float((up.double() @ down.double()).square().sum())
            cut, total = cut + norm * cut_share(down, up, keep_mask), total + norm
    is_cut = settings.merge == "at_merge" and len(masks) > 0
    return Merge(model, (cut / total if total else 0.0) if is_cut else None)


def write_adapters(folder: Path, base: Path, adapters: Mapping[str, LowRank], rank: int) -> None:
    """A folder that peft, and whoever reads its folders, loads; whole or not at all.

    Beside peft's files, `sparse.json` says which model the adapters belong to and whether a mask
    was between them and it: then they are no plain LoRA, and only the merge is what was trained.

    Args:
        folder: is made.
        base: the model's folder.
        adapters: full layer name -> trained adapter.
        rank: of all of them.
    """
    first = next(iter(adapters.values()))
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=first.scale * rank,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=sorted(adapters), bias="none", base_model_name_or_path=str(base),
    )  # fmt: skip
    with torch.device("meta"):
        model = peft.get_peft_model(build_model(base), config)
    state = {}
    for name, adapter in adapters.items():
        for part, param in (("lora_A", adapter.down_RI), ("lora_B", adapter.up_OR)):
            values = param.detach().float().cpu().contiguous()
            state[f"base_model.model.{name}.{part}.default.weight"] = values
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    facts = {"base_sha256": model_fingerprint(base), "merge": first.way}
    write_json(folder / _FACTS, facts)


def read_adapters(folder: Path, base_sha256: str) -> dict[str, Pair]:
    """Full layer name -> A and B of a LoRA folder that peft or `write_adapters` wrote.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        base_sha256: fingerprint of the model that they are for; a folder that names another is
            refused, one of somebody else's names none.

    Raises:
        InputError: no such folder, adapters of another kind than plain LoRA, or of another model.
    """
    field = f"finetune.adapter_from={folder}"
    if not (folder / _WEIGHTS).is_file():
        raise InputError(f"{field}: has no {_WEIGHTS}; give a folder of LoRA adapters")
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(folder), local_files_only=True)
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # whatever peft raises of a damaged folder
        raise InputError(f"{field}: cannot be read ({first_line(error)})") from None
    others = [name for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern",
                                "alpha_pattern") if getattr(config, name, None)]  # fmt: skip
    if config.peft_type != "LORA" or others or getattr(config, "bias", "none") != "none":
        raise InputError(
            f"{field}: is {config.peft_type} with {', '.join(others) or 'other options'}; plain "
            "LoRA adapters are what can be merged under a mask"
        )
    if (folder / _FACTS).is_file():
        facts = json.loads((folder / _FACTS).read_bytes())
        if facts["base_sha256"] != base_sha256:
            raise InputError(
                f"{field}: was trained on another model (fingerprint {facts['base_sha256'][:12]}) "
                f"than this one ({base_sha256[:12]}); give run.from= of that model"
            )
    found: dict[str, dict[str, Tensor]] = {}
    for key, values in weights.items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        found.setdefault(name, {})[part.partition(".")[0]] = values
    return {name: (parts["A"], parts["B"]) for name, parts in found.items()}
