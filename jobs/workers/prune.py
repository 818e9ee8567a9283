"""One worker's part of the prune stage: rows, options, and each method on the checkpoint."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cluster.runtime.worker import WorkerContext
from conf.schema import Config
from jobs.corpus.rows import load_rows
from jobs.runs.folder import disk_errors
from jobs.workers.placement import placed, walk_sizes
from jobs.workers.prune_inputs import (
    NUM_HELD_ROWS,
    dense_layers,
    fisher_weights,
    rotated_model,
    wanted_rotation_steps,
)
from sparsify.calibration.hidden_states import Memory
from sparsify.calibration.layers import InputOrder, passes_ahead
from sparsify.comm import Comm
from sparsify.errors import InputError
from sparsify.formats.basis import carry_rotation, rotation_facts
from sparsify.formats.sparse_folder import (
    MASKS,
    ROTATION,
    facts_of_dense,
    model_fingerprint,
    write_sparsity,
)
from sparsify.formats.verify import check_files
from sparsify.masks.storage import MaskFile, merge_masks, save_masks
from sparsify.methods import Method, PruneParams, get_method
from sparsify.models.blocks import layout_in, reason_to_hold_whole, stored_of
from sparsify.models.load import (
    DTYPES,
    check_sequence_length,
    load_model,
    load_tokenizer,
    read_config,
)
from sparsify.models.save import save_model
from sparsify.models.stored import check_stored, places_in
from sparsify.packed.layer import packed_num_bytes
from sparsify.pattern import Pattern
from sparsify.pruning.one_pass import FOLDER as CODES
from sparsify.pruning.one_pass import OnePass
from sparsify.pruning.progress import FEW_TOKENS, LayerReport, lent_remark
from sparsify.pruning.prune import LayerChoice, PruneResult, prune_checkpoint, prune_model

_FIGURES = (
    "relative_error", "sparsity", "damping", "num_dead_columns", "tokens_per_column", "condition",
    "large_kept",
)  # fmt: skip


def layer_metrics(report: dict[str, Any], method: str) -> dict[str, float]:
    """A pruned layer's figures under flat names, as trackers take them.

    Args:
        report: fields of a `LayerReport`.
        method: name of the method, which becomes part of the names.

    Returns:
        prune/<method>/<figure> and prune/<method>/seconds/<phase>; figures that are None, such as
        the condition of a method without a factor, are left out.
    """
    found = {name: report[name] for name in _FIGURES if report.get(name) is not None}
    found |= {f"seconds/{phase}": s for phase, s in (report.get("seconds") or {}).items()}
    return {f"prune/{method}/{name}": float(value) for name, value in found.items()}


class Pruning:
    """What the methods of one run share.

    Args:
        context: this worker.
        config: of the run.
        dense: folder of the model to prune.
        scratch: folder on a disk that all workers see; survives an interruption.
    """

    def __init__(self, context: WorkerContext, config: Config, dense: Path, scratch: Path) -> None:
        torch.set_num_threads(context.num_threads)
        settings = config.prune
        self._context = context
        self._config = config
        self._dense = dense
        self._scratch = scratch
        self._rotated: Path | None = None
        is_fixed = settings.reduction == "fixed"
        many = context.world_size > 1
        self._comm = Comm.distributed(is_fixed) if many else Comm.single(is_fixed)
        self._pattern = Pattern.parse(settings.pattern)
        self._params: PruneParams = settings
        self._reason = reason_to_hold_whole(dense)
        if self._reason is None:  # else all of it is loaded, and looked at, before it is pruned
            self._comm.run_together(self._check_weights)
        self._tokenizer = load_tokenizer(dense)
        check_sequence_length(read_config(dense), config.data.sequence_length)
        num_held = NUM_HELD_ROWS if settings.budget else 0
        rows, warning = load_rows(
            config.data, "calibration", self._tokenizer, settings.num_samples + num_held,
            config.run.seed,
        )  # fmt: skip
        self._rows = rows[: len(rows) - num_held]
        self._held_rows = rows[len(rows) - num_held :]
        if warning:
            context.warn(warning)
        if self._reason is not None and config.quantize.one_pass:
            raise InputError(
                f"quantize.one_pass=true: the model cannot be read block by block, because "
                f"{self._reason}; quantise it in a walk of its own"
            )
        if self._reason is not None:
            context.warn(
                f"prune: the whole model is held in memory and is not resumable by blocks, because "
                f"{self._reason}"
            )
        self.dense_layers: list[str] = []
        """left dense under prune.budget, by the main method"""
        self.rotation: dict[str, Any] | None = None
        """what folding rotations in did, for the main method"""
        self.seconds_ahead = 0.0
        """of the main method's work on the whole model, before the walk that its layers report"""

    def run(self, name: str, index: int, num_methods: int) -> list[dict[str, Any]]:
        """Prune with method `name`, resuming where an earlier run was stopped.

        Returns:
            The layers' reports as plain values.
        """
        context, settings = self._context, self._config.prune
        is_main = name == settings.method

        def say(done: float, total: float, text: str) -> None:
            share = index + done / total
            context.progress(share * total, num_methods * total, f"{text}, {name}")

        def on_block(done: int, total: int) -> None:
            say(done, total, "blocks")

        layers = LayerChoice(
            settings.skip,
            settings.existing,  # type: ignore[arg-type]
            self._order(name),
        )
        dense = self._dense
        shared = (self._config, self._scratch, self._comm, context.device, say)
        if is_main and wanted_rotation_steps(self._config, dense):
            self._rotated, self.rotation = rotated_model(dense, self._rows, *shared)
            dense = self._rotated or dense
            self.seconds_ahead += self.rotation["seconds"]
            self._warn_of_rotation(self.rotation)
        if is_main and settings.fisher:
            weights_LNT, seconds = fisher_weights(dense, self._rows, *shared)
            layers = replace(layers, token_weights=weights_LNT)
            self.seconds_ahead += seconds
        folder = self._scratch / name
        if is_main and settings.budget:
            everything = self._scratch / f"{name}-all"
            first = self._prune(name, dense, everything, layers, on_block)
            found = dense_layers(dense, everything, self._held_rows, *shared)
            self.dense_layers = found["dense_names"]
            self.seconds_ahead += found["seconds"]
            self.seconds_ahead += sum(sum(layer.seconds.values()) for layer in first.layers)
            layers = replace(layers, skip=[*layers.skip, *self.dense_layers])
        quantiser = None
        if is_main and self._config.quantize.one_pass:
            quantiser = OnePass(self._config.quantize, self._config.quantize.skip)
            if unused := self._config.quantize.unused():
                self._context.warn(
                    f"quantize.one_pass=true: the walk is that of prune, with its rows and its "
                    f"options; {', '.join(unused)} has no effect"
                )
        result = self._prune(name, dense, folder, layers, on_block, quantiser)
        if is_main:
            self._warn_of(result.layers)
        for number, report in enumerate(result.layers):
            context.metrics(layer_metrics(asdict(report), name), number)
        return [asdict(report) for report in result.layers]

    def _warn_of_rotation(self, facts: dict[str, Any]) -> None:
        if "refused" in facts:
            self._context.warn(f"prune: no {facts['refused']}")
        elif facts["untied_bytes"]:
            self._context.warn(
                f"prune: rotations gave the output layer a weight of its own, "
                f"{facts['untied_bytes'] / 1e6:,.1f} MB more; prune.rotation_steps=0 keeps it tied"
            )

    def _prune(
        self, name: str, dense: Path, folder: Path, layers: LayerChoice,
        on_block: Callable[[int, int], None], one_pass: OnePass | None = None,
    ) -> PruneResult:  # fmt: skip
        """One walk over the model, block by block from the disk where that is possible."""
        settings, context, method = self._config.prune, self._context, get_method(name)
        args = (self._rows, method, self._pattern, self._params)
        memory = Memory(
            settings.batch_size, self._config.model.dtype, context.device,
            attention=settings.attention, overlap=settings.overlap,
        )  # fmt: skip
        common: dict[str, Any] = {
            "comm": self._comm, "layers": layers, "on_block": on_block,
            "clock": time.perf_counter,
        }  # fmt: skip
        if self._reason is not None:
            model = load_model(dense, self._config.model.dtype, context.device)
            memory = self._placed(method, memory, "device")
            result = prune_model(model, *args, memory=memory, **common)
            if context.rank == 0:
                if not save_model(model, None, folder):
                    context.warn(
                        "prune: tensors are written under the names of transformers' modules, not "
                        "those of the family's checkpoints, in which pruned layers have others; "
                        "transformers loads them, other engines may not"
                    )
                save_masks(folder / "masks-00001.safetensors", result.keep_masks)
            return result
        memory = self._placed(method, memory, settings.activations)
        if self._passes_ahead(method) and memory.activations != "device":
            context.warn(
                f"prune: no prune.overlap for {name}: the device has no room for what the dense "
                "model does ahead; use fewer calibration rows or more workers"
            )
            memory = replace(memory, overlap=False)
        return prune_checkpoint(
            dense, folder, *args, memory=memory,
            checkpoint_every_blocks=settings.checkpoint_every_blocks, one_pass=one_pass, **common,
        )  # fmt: skip

    def _check_weights(self) -> None:
        """This worker's part of a look at every weight, before hours of work on the first ones."""
        dtype = self._config.model.dtype
        stored = stored_of(self._dense, dtype)
        check_stored(
            self._dense, stored.places, DTYPES[dtype], self._comm.rank, self._comm.world_size
        )

    def _order(self, name: str) -> InputOrder:
        """When inputs are measured: as asked for, or as the method has it."""
        asked = self._config.prune.order
        return get_method(name).order if asked == "auto" else asked  # type: ignore[return-value]

    def _passes_ahead(self, method: Method) -> bool:
        """Whether the dense model is to pass the next block while layers are solved."""
        can = passes_ahead(self._order(method.name), method.needs_teacher)
        return self._config.prune.overlap and can

    def _placed(self, method: Method, memory: Memory, asked: str) -> Memory:
        """Where hidden states go: as asked for, or where there is room for them."""
        own = walk_sizes(
            self._context, self._config, self._dense, self._rows.num_tokens, method.needs_teacher,
            self._passes_ahead(method),
        )  # fmt: skip
        return placed(self._comm, own, asked, memory)

    def _warn_of(self, layers: list[LayerReport]) -> None:
        """Say which layers have seen too little data."""
        few = [layer for layer in layers if layer.tokens_per_column < FEW_TOKENS]
        if few:
            worst = min(few, key=lambda layer: layer.tokens_per_column)
            self._context.warn(
                f"prune: {len(few)} of {len(layers)} layers have fewer than {FEW_TOKENS:g} "
                f"calibration tokens per input column, {worst.name} has "
                f"{worst.tokens_per_column:.1f}; raise prune.num_samples or data.sequence_length"
            )
        if said := lent_remark(layers):
            self._context.warn(f"prune: {said}")
        dead = [layer for layer in layers if layer.num_dead_columns]
        if dead:
            worst = max(dead, key=lambda layer: layer.num_dead_columns)
            self._context.warn(
                f"prune: {len(dead)} layers have input columns that were zero on every "
                f"calibration token, {worst.name} has {worst.num_dead_columns}"
            )

    def publish(self, name: str, folder: Path, compared: Path) -> None:
        """Make the stage's model folder from a method's finished blocks; rank 0 calls it.

        `compared` is the dense model of the run: what is pruned, or what that lost layers of.
        """
        source = self._scratch / name
        folder.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.startswith(("masks-", "progress", ".")):
                _link(path, folder / path.name)
        merge_masks(sorted(source.glob("masks-*.safetensors")), folder / MASKS)
        for path in sorted((source / CODES).glob("*.safetensors")):
            codes = folder.parent / CODES
            codes.mkdir(exist_ok=True)
            _link(path, codes / path.name)
        self._tokenizer.save_pretrained(folder)
        source_sha256 = model_fingerprint(self._dense)
        if name == self._config.prune.method and self._rotated is not None:
            _link(self._rotated / ROTATION, folder / ROTATION)
            basis = rotation_facts(folder / ROTATION, source_sha256)
        else:
            basis = carry_rotation(self._dense, folder)
        provenance = {
            **facts_of_dense(self._dense, compared, source_sha256),
            **basis,
            "num_calibration_tokens": self._rows.num_tokens,
            "seed": self._config.run.seed,
        }
        masks = MaskFile(folder / MASKS)
        write_sparsity(folder, masks, self._config.prune.pattern, name, provenance)

    def packed_bytes(self, folder: Path) -> int:
        """Size that the pruned model has when its layers are packed."""
        layers = MaskFile(folder / MASKS).shapes.keys()
        return packed_num_bytes(_shapes(folder), layers, self._pattern)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _shapes(folder: Path) -> dict[str, Tensor]:
    """Tensors of a model folder's files by the model's names, without their values."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16,
              "F16": torch.float16}  # fmt: skip
    found = {}
    places = list(places_in(sorted(folder.glob("*.safetensors"))))
    for place in places:
        with safe_open(place.path, framework="pt") as file:
            dtype = dtypes.get(file.get_slice(place.name).get_dtype())
            if dtype is None:  # a buffer of integers or truth values: no weight
                found[place.name] = file.get_tensor(place.name)
            else:
                found[place.name] = torch.empty(place.shape, dtype=dtype, device="meta")
    return dict(layout_in(folder, places).separated(found.items()))


def prune_on_worker(context: WorkerContext, payload: dict[str, Any]) -> dict[str, Any] | None:
    """On every worker: prune the dense model with each method, each from where it was left.

    A method's folder in the scratch space holds its finished blocks. All of them become part of
    the stage's result at the end, so that a run that is killed loses no more than a block.

    Returns:
        On rank 0 the figures of all methods, else None.
    """
    pruning = Pruning(context, payload["config"], payload["dense"], payload["scratch"])
    with disk_errors(payload["scratch"]):
        found = {
            name: pruning.run(name, index, len(payload["methods"]))
            for index, name in enumerate(payload["methods"])
        }
        if context.rank != 0:
            return None
        for name in payload["methods"]:
            pruning.publish(name, payload["folder"] / name, payload["compared"])
    phases = {name: _seconds(reports) for name, reports in found.items()}
    seconds = {name: sum(parts.values()) for name, parts in phases.items()}
    seconds[payload["config"].prune.method] += pruning.seconds_ahead
    layers = [{"method": name, **layer} for name, reports in found.items() for layer in reports]
    return {
        "layers": layers,
        "packed_bytes": {name: pruning.packed_bytes(payload["folder"] / name) for name in found},
        "phases": phases,
        "seconds": seconds,
        "dense_layers": pruning.dense_layers,
        "rotation": pruning.rotation,
    }


def check_result(folder: Path, pattern: str) -> dict[str, int]:
    """On the driver: whether every pruned weight of what was written is zero; its counts."""
    return check_files(folder, MaskFile(folder / MASKS), Pattern.parse(pattern))


def _seconds(reports: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by phase over all layers."""
    phases = {phase: 0.0 for report in reports for phase in report["seconds"]}
    return {phase: sum(r["seconds"].get(phase, 0.0) for r in reports) for phase in phases}
