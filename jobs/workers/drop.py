"""On every worker: a share of the calibration rows, to choose layers by; rank 0 writes the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cluster.runtime.worker import WorkerContext
from conf.schema import Config
from jobs.corpus.rows import load_rows
from jobs.runs.folder import disk_errors
from sparsify.comm import Comm
from sparsify.data.rows import TokenRows
from sparsify.dropping import Choice, Task, Unit, get_rule
from sparsify.errors import InputError
from sparsify.evaluation.divergence import forward_kl
from sparsify.files import write_json
from sparsify.formats.basis import carry_rotation
from sparsify.formats.source import masks_of_source, open_source
from sparsify.formats.sparse_folder import (
    KEPT,
    MASKS,
    kept_layers,
    model_fingerprint,
    read_sparsity,
    write_sparsity,
)
from sparsify.formats.verify import check_files, own_masks
from sparsify.masks.storage import BitMasks, mask_to_bits, save_masks
from sparsify.models.blocks import (
    Blocks,
    BlocksInMemory,
    BlocksOnDisk,
    reason_to_hold_whole,
    stored_of,
)
from sparsify.models.calls import BlockCalls
from sparsify.models.fewer_layers import (
    cut_config,
    prove_fewer,
    renamed,
    require_same_parts,
    write_fewer,
)
from sparsify.models.load import (
    build_model,
    check_sequence_length,
    load_model,
    load_tokenizer,
    read_config,
    weight_files,
)
from sparsify.models.structure import find_blocks
from sparsify.models.sublayers import output_layers, require_residual, sublayers_of
from sparsify.pattern import DENSE
from sparsify.tensors import tensor_names

_CHOICE, _ROUNDS = "choice.json", "rounds.json"


def check_drop(config: Config, source: Path) -> None:
    """Require that so many layers can be dropped, as far as is known before any is chosen.

    Raises:
        InputError: there are not so many; or see `cut_config`, `require_same_parts` and
            `sublayers_of`.
    """
    settings = config.drop
    with torch.device("meta"):
        model = build_model(source)
    blocks = find_blocks(model)[1]
    num = settings.num_dropped(len(blocks))
    gone = list(settings.layers)
    if settings.rule == "deepest" and not gone:
        task = Task(len(blocks), num, lambda: BlocksInMemory(model))
        gone = [unit.layer for unit in get_rule("deepest").choose(task).units]
    kept = [layer for layer in range(len(blocks)) if layer not in gone]
    config_of_kept = cut_config(read_config(source), kept)
    if gone:
        require_same_parts(model, config_of_kept, kept)
    if settings.candidates != ["layers"]:
        sublayers_of(blocks[0], type(model).__name__)


def drop_on_worker(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any] | None:
    """On every worker: choose what goes; rank 0 writes what is left and proves it.

    Returns:
        On rank 0 the figures, else None.
    """
    torch.set_num_threads(context.num_threads)
    config, source, scratch = payload["config"], payload["source"], payload["scratch"]
    dropping = Dropping(context, config, source)
    path = scratch / _CHOICE
    with disk_errors(scratch):
        if path.is_file():
            held = json.loads(path.read_bytes())
            choice = Choice(tuple(Unit(**unit) for unit in held["units"]), held["figures"])
        else:
            choice = dropping.choose(scratch)
        if context.rank != 0:
            return None
        units = [{"layer": unit.layer, "part": unit.part} for unit in choice.units]
        write_json(path, {"units": units, "figures": choice.figures})
    with disk_errors(payload["folder"]):
        figures = dropping.write(choice, payload["folder"], payload["dense"])
    return {**figures, **choice.figures}


class Dropping:
    """One worker's part of the stage.

    Args:
        context: this worker.
        config: of the run.
        source: folder of the model to drop layers of.
    """

    def __init__(self, context: WorkerContext, config: Config, source: Path) -> None:
        self._context = context
        self._config = config
        self._source = source
        self._tokenizer = load_tokenizer(source)
        self._num_layers = int(read_config(source).get_text_config().num_hidden_layers)

    def choose(self, scratch: Path) -> Choice:
        """What goes, by the rule or as it was named."""
        settings, context = self._config.drop, self._context
        num = settings.num_dropped(self._num_layers)
        if settings.layers:
            return Choice(tuple(Unit(layer) for layer in sorted(settings.layers)))
        rule = get_rule(settings.rule)
        comm = Comm.distributed() if context.world_size > 1 else Comm.single()
        rows = self._rows() if rule.needs_rows else None
        task = Task(
            self._num_layers, num, self.open, rows and rows[comm.row_slice(len(rows))], comm,
            settings.candidates, settings.batch_size, context.device, forward_kl,
            scratch / _ROUNDS,
            lambda done, total, what: context.progress(done, total, f"{what}, {rule.name}"),
        )  # fmt: skip
        choice = rule.choose(task)
        if rows is not None:
            facts = {"num_rows": len(rows), "num_tokens": rows.num_tokens}
            choice = Choice(choice.units, {**choice.figures, **facts})
        return choice

    def _rows(self) -> TokenRows:
        config = self._config
        check_sequence_length(read_config(self._source), config.data.sequence_length)
        rows, warning = load_rows(
            config.data, "calibration", self._tokenizer, config.drop.rows, config.run.seed
        )
        if warning:
            self._context.warn(warning)
        return rows

    def open(self) -> Blocks:
        """The model's blocks, from the disk one at a time where that is possible."""
        return open_blocks(self._source, self._config.model.dtype, self._context.device)

    def write(self, choice: Choice, folder: Path, dense: Path) -> dict[str, Any]:
        """The checkpoint of what is left: proved, and with its masks and its origin beside it."""
        gone = [unit.layer for unit in choice.units if unit.part == "layers"]
        kept = [layer for layer in range(self._num_layers) if layer not in gone]
        parts = [unit for unit in choice.units if unit.part != "layers"]
        zeroed, quiet = self._zeroed(parts)
        stored = stored_of(self._source, self._config.model.dtype).places if zeroed else {}
        tensors = [name for layer in zeroed for name in self._tensors(layer, stored)]
        names = {stored[n].name if stored[n].at is None else n for n in tensors}
        write_fewer(self._source, folder, kept, names)
        self._tokenizer.save_pretrained(folder)
        prove_fewer(self.open(), open_blocks(folder, self._config.model.dtype,
                    self._context.device), kept, quiet)  # fmt: skip
        earlier = kept_layers(self._source) or list(range(self._num_layers))
        self._describe(folder, dense, kept, zeroed, [earlier[layer] for layer in kept])
        before, after = _num_weights(self._source), _num_weights(folder)
        return {
            "rule": "layers" if self._config.drop.layers else self._config.drop.rule,
            "num_layers_before": self._num_layers,
            "num_layers": len(kept),
            "dropped_layers": gone,
            "dropped_sublayers": [{"layer": u.layer, "part": u.part} for u in parts],
            KEPT: [earlier[layer] for layer in kept],
            "num_weights_before": before,
            "num_weights": after,
        }

    def _zeroed(self, parts: Sequence[Unit]) -> tuple[list[str], dict[int, list[str]]]:
        """Layers that have to be zero for sublayers to be gone, and these sublayers' names."""
        if not parts:
            return [], {}
        blocks = self.open()
        name = type(blocks.model).__name__
        rows = TokenRows.whole(torch.arange(8)[None])
        calls = BlockCalls(blocks.model, blocks.blocks)
        calls.learn(blocks.open(0), rows)
        hidden_BTD, arguments = calls.all(rows)
        found: list[str] = []
        quiet: dict[int, list[str]] = {}
        for unit in parts:
            block = blocks.open(unit.layer)
            call = arguments.call(unit.layer, hidden_BTD)
            require_residual(block, call, name)
            part = sublayers_of(block, name)[unit.part]
            quiet.setdefault(unit.layer, []).append(part)
            found += [
                f"{blocks.list_name}.{unit.layer}.{layer}"
                for layer in output_layers(block, part, call, name)
            ]
        return found, quiet

    def _tensors(self, layer: str, stored: Mapping[str, Any]) -> list[str]:
        """Names of a layer's tensors, which the files must have as they are."""
        found = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in stored]
        if f"{layer}.weight" not in found:
            raise InputError(
                f"model folder {self._source}: {layer}.weight is not stored under its own name, so "
                "no sublayer can be dropped; use drop.candidates=[layers]"
            )
        return found

    def _describe(
        self, folder: Path, dense: Path, kept: Sequence[int], zeroed: Sequence[str],
        kept_of_dense: list[int],
    ) -> None:  # fmt: skip
        """Masks, pattern and origin; weights of sublayers that are gone are pruned, so that they
        stay zero in recovery."""
        before = read_sparsity(self._source) or {}
        bits: dict[str, torch.Tensor] = {}
        shapes: dict[str, Sequence[int]] = {}

        def keep(name: str, mask: torch.Tensor) -> None:
            if (new := renamed(name, prefix, kept)) is not None:
                bits[new], shapes[new] = mask_to_bits(mask), tuple(mask.shape)

        pattern = DENSE
        with torch.device("meta"):
            model = build_model(self._source)
        prefix = f"{find_blocks(model)[0]}."
        if self._source != dense:
            prune = self._config.prune
            source = open_source(self._source, None)
            found, its_pattern = masks_of_source(source, prune.pattern, prune.skip)
            pattern = str(its_pattern)
            for name in found:
                keep(name, found[name])
        for layer in zeroed:
            shape = model.get_parameter(f"{layer}.weight").shape
            keep(layer, torch.zeros(shape, dtype=torch.bool))
        masks = BitMasks(bits, shapes)
        save_masks(folder / MASKS, masks)
        provenance = {
            **before.get("provenance", {}),
            "dense_path": str(dense.resolve()),
            "dense_sha256": model_fingerprint(dense),
            **carry_rotation(self._source, folder),
            KEPT: kept_of_dense,
        }
        method = before.get("method", "dropped" if pattern == DENSE else "given")
        write_sparsity(folder, masks, pattern, method, provenance)


def open_blocks(folder: Path, dtype: str, device: str) -> Blocks:
    """A checkpoint's blocks, read one at a time where its tensors allow it."""
    if reason_to_hold_whole(folder) is None:
        return BlocksOnDisk(folder, dtype, device, with_head=True)
    return BlocksInMemory(load_model(folder, dtype, device))


def check_result(folder: Path) -> dict[str, int]:
    """On the driver: whether every pruned weight of what was written is zero; its counts."""
    masks, pattern = own_masks(folder)
    assert masks is not None, "the stage writes masks"
    return check_files(folder, masks, pattern)


def _num_weights(folder: Path) -> int:
    """Elements of all tensors of a model folder's files."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in tensor_names(file):
                total += int(torch.Size(file.get_slice(name).get_shape()).numel())
    return total
