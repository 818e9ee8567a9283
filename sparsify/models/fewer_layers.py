"""A checkpoint without some of its layers: the configuration, and the files, a shard at a time.

What stays is renumbered, and nothing else of it changes, so that every loader of the family takes
the result. `prove_fewer` runs what was written against the model that it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sparsify.data.rows import TokenRows
from sparsify.errors import CorruptCheckpointError, InputError
from sparsify.models.blocks import Blocks
from sparsify.models.calls import BlockCalls, run_block
from sparsify.models.layout import layout_of
from sparsify.models.load import model_of, read_config, stored_places
from sparsify.models.save import copy_generation_config, finish_weights
from sparsify.models.stored import own_places
from sparsify.models.structure import find_blocks
from sparsify.models.sublayers import silent
from sparsify.tensors import Shards

_NUMBERS = ("mlp_only_layers", "moe_layers")
"""lists of the configuration with numbers of layers"""

_FIRST = ("first_k_dense_replace",)
"""how many of the first layers are of another kind"""

_OF_LAYERS = re.compile(r"layer|block|types$|pattern$|^(intermediate_size|num_.*heads|head_dim)$")
"""names of lists with an entry for each layer"""

_OF_NO_LAYERS = re.compile(r"token|architectures|^keys_to_ignore|^mtp_")
"""names of lists that may have as many entries as there are layers by chance"""

_LEFT_OUT = ("num_kv_shared_layers",)
"""numbers by which layers depend on each other"""

_SHARD_BYTES = 2 * 2**30

_NUM_PROOF_TOKENS = 32


def cut_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model that has only some of its decoder layers.

    Args:
        config: of the whole model; of one with other parts, its text configuration is cut.
        kept: layers that stay, in order.

    Raises:
        InputError: a setting that depends on layers in a way that is not known, by its name.
    """
    cut = deepcopy(config)
    text: Any = cut.get_text_config()
    num_layers = text.num_hidden_layers
    changes: dict[str, Any] = {}
    for name, value in text.to_dict().items():
        if name in _LEFT_OUT and value:
            raise InputError(
                f"config.json: {name}={value}: layers use what others computed, so none can be "
                "taken out; only models whose layers stand alone can lose some"
            )
        if name in _FIRST and value:
            changes[name] = sum(layer < value for layer in kept)
        if not isinstance(value, list | tuple):
            continue
        if name in _NUMBERS:
            changes[name] = [kept.index(layer) for layer in value if layer in kept]
        elif len(value) == num_layers and _OF_LAYERS.search(name):
            changes[name] = [value[layer] for layer in kept]
        elif len(value) == num_layers and num_layers > 1 and not _OF_NO_LAYERS.search(name):
            raise InputError(
                f"config.json: {name} has {num_layers} entries, as many as there are layers, and "
                "whether it is by layer is not known; layers cannot be dropped from this family"
            )
    text.num_hidden_layers = len(kept)
    for name, value in changes.items():
        setattr(text, name, value)
    return cut


def require_same_parts(model: nn.Module, cut: PretrainedConfig, kept: Sequence[int]) -> nn.Module:
    """Require that a model of the cut configuration has the tensors that the kept layers have.

    Args:
        model: the whole one; its weights may be on the meta device.
        cut: of `cut_config`.
        kept: layers that stay.

    Returns:
        The model of the cut configuration, without weights.

    Raises:
        InputError: it has others: kinds of layers go by their number in a way that is not known.
    """
    list_name, blocks = find_blocks(model)
    with torch.device("meta"):
        smaller = model_of(cut, "config.json with fewer layers")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wanted = {
        new: shape
        for name, shape in shapes.items()
        if (new := renamed(name, f"{list_name}.", kept)) is not None
    }
    found = {name: tuple(value.shape) for name, value in smaller.state_dict().items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"{type(model).__name__}: with {len(kept)} of its {len(blocks)} layers, "
                f"config.json asks for {name} of shape {found.get(name)} and the layers that stay "
                f"have {wanted.get(name)}: kinds of layers go by their number here; choose other "
                "layers with drop.layers"
            )
    return smaller


def renamed(name: str, prefix: str, kept: Sequence[int]) -> str | None:
    """A tensor's or layer's name in the smaller model; None if its layer is gone.

    Args:
        name: in the whole model.
        prefix: what comes before the number of a layer.
        kept: layers that stay, in order.
    """
    if not name.startswith(prefix):
        return name
    number, dot, rest = name[len(prefix) :].partition(".")
    return f"{prefix}{kept.index(int(number))}{dot}{rest}" if int(number) in kept else None


def stored_prefix(names: Collection[str], list_name: str, num_layers: int) -> str:
    """What comes before a layer's number in the names of a checkpoint's tensors.

    Args:
        names: of the files.
        list_name: of the blocks in the model.
        num_layers: that there are.

    Raises:
        InputError: no one prefix has all of them.
    """
    leaf = list_name.rpartition(".")[2]
    found: dict[str, set[int]] = {}
    for name in names:
        for match in re.finditer(rf"(?:^|\.){re.escape(leaf)}\.(\d+)\.", name):
            found.setdefault(name[: match.start(1)], set()).add(int(match[1]))
    whole = sorted(prefix for prefix, seen in found.items() if seen == set(range(num_layers)))
    if f"{list_name}." in whole:
        return f"{list_name}."
    if len(whole) != 1:
        raise InputError(
            f"the checkpoint has {len(whole)} lists of {num_layers} numbered layers under names "
            f"that end in {leaf!r}; which are the decoder's is not known, so none can be dropped"
        )
    return whole[0]


def write_fewer(
    folder: Path, target: Path, kept: Sequence[int], zeroed: Collection[str] = ()
) -> None:
    """Write the checkpoint of the layers that stay: config.json, weights, generation_config.json.

    Tensors are copied as they are stored, under the family's own names; a packed folder's as the
    dense weights that it stands for. At most a shard of them is in memory, and the experts of a
    block where they are stored fused.

    Args:
        folder: of the whole model.
        target: made if it is not there.
        kept: layers that stay, in order.
        zeroed: names of tensors that become zero: stored ones, or an expert's in the model.

    Raises:
        InputError: see `cut_config` and `stored_prefix`.

    Cost: reads and writes the weights that stay, once.
    """
    config = read_config(folder)
    cut = cut_config(config, kept)
    with torch.device("meta"):
        model = model_of(config, str(folder / "config.json"))
    list_name, blocks = find_blocks(model)
    smaller = require_same_parts(model, cut, kept)
    places = list(own_places(stored_places(folder), layout_of(model)))
    prefix = stored_prefix([name for name, _ in places], list_name, len(blocks))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, place in places:
            new = renamed(name, prefix, kept)
            if new is not None:
                tensor = place.read(None)
                yield new, torch.zeros_like(tensor) if name in zeroed else tensor

    shards = Shards(target, _SHARD_BYTES)
    for name, tensor in layout_of(smaller).joined(tensors()):
        shards.add({name: tensor})
    finish_weights(shards, target)
    cut.architectures = cut.architectures or [type(model).__name__]
    cut.save_pretrained(target)
    copy_generation_config(folder, target)


@torch.no_grad()
def prove_fewer(
    source: Blocks, made: Blocks, kept: Sequence[int],
    quiet: Mapping[int, Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """Run the whole model without the layers that went, and what was written, side by side.

    Args:
        source: blocks of the whole model, none of them opened yet.
        made: of what was written.
        kept: layers that stayed.
        quiet: layer of the whole model -> names of its sublayers that were left out.

    Raises:
        CorruptCheckpointError: after a layer, the hidden states of a row of random tokens differ by
            a single bit: the configuration says something of the layers that was not understood.

    Cost: reads the layers that stayed, of both; one forward of 32 tokens.
    """
    config: Any = made.model.config
    text = config.get_text_config()
    length = min(_NUM_PROOF_TOKENS, getattr(text, "max_position_embeddings", None) or 2**30)
    generator = torch.Generator().manual_seed(0)
    rows = TokenRows.whole(torch.randint(text.vocab_size, (1, length), generator=generator))
    calls = [BlockCalls(blocks.model, blocks.blocks) for blocks in (source, made)]
    both: list[Any] = []
    for new, old in enumerate(kept):
        pair = source.open(old), made.open(new)
        if new == 0:
            for call, block in zip(calls, pair, strict=True):
                call.learn(block, rows)
                both.append(call.all(rows))
        (hidden_BTD, arguments), (same_BTD, same_arguments) = both
        parts = [pair[0].get_submodule(name) for name in (quiet or {}).get(old, ())]
        with silent(parts):
            hidden_BTD = run_block(pair[0], arguments.call(old, hidden_BTD))
        same_BTD = run_block(pair[1], same_arguments.call(new, same_BTD))
        if not torch.equal(hidden_BTD, same_BTD):
            raise CorruptCheckpointError(
                f"drop: layer {new} of what was written does not compute what layer {old} did "
                f"without the layers that went (differs by "
                f"{float((hidden_BTD - same_BTD).abs().max()):.3g}); config.json says something of "
                f"layers that is not understood, so {type(made.model).__name__} cannot lose any"
            )
        both = [(hidden_BTD, arguments), (same_BTD, same_arguments)]
        source.close(old)
        made.close(new)
