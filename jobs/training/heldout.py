"""Held-out loss while a recovery runs, for every domain of its text by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from conf.options.data import DataConfig, parse_mix
from conf.schema import Config
from jobs.corpus.rows import load_rows
from jobs.corpus.sources import source_label
from sparsify.data.rows import TokenRows
from sparsify.data.store import TokenStore
from sparsify.data.store_write import write_rows
from sparsify.distillation import TokenCounts
from sparsify.params import LossWeights

FIGURES = ("kl", "ce", "agreement")

Forward = Callable[[TokenRows, LossWeights, TokenCounts], dict[str, torch.Tensor]]


def domains(data: DataConfig) -> dict[str, DataConfig]:
    """Label -> the data settings whose held-out text is that domain.

    Of a mix without held-out text of its own every source is a domain: the part of it that is kept
    back. Otherwise there is one, what `jobs.evaluate` scores.
    """
    if not data.mix or data.heldout is not None or data.train is not None:
        return {"heldout": data}
    found: dict[str, DataConfig] = {}
    for _, name in parse_mix("data.mix", data.mix):
        label = source_label(name)
        label = label if label not in found else name
        found[label] = replace(data, mix=[], calibration=name)
    return found


def write_heldout(config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Tokenise the held-out text of every domain into a store, one source each.

    Returns:
        Warnings for the user: domains with less text than was asked for, or with rows that the
        workers leave out.
    """
    length, num_workers = config.data.sequence_length, config.cluster.num_workers
    num_rows = max(1, config.distill.heldout_tokens // length)
    rows_of, warnings = {}, []
    for label, data in domains(config.data).items():
        rows, warning = load_rows(data, "heldout", tokenizer, num_rows, config.run.seed)
        rows_of[label] = rows
        warnings += [warning] if warning else []
        num_left = len(rows) % num_workers if len(rows) > num_workers else 0
        if num_left:
            warnings.append(
                f"distill: {num_left} of the {len(rows)} held-out rows of {label} are not scored "
                f"on the way, for {num_workers} workers score equally many"
            )
    write_rows(folder, rows_of, tokenizer, length)
    return warnings


class Heldout:
    """Scores a student on held-out rows, which the workers share.

    All workers make equally many forwards, as ZeRO-3 needs: up to one row per worker and domain is
    left out where the number of workers does not divide them.

    Args:
        store: from `write_heldout`.
        rank: this worker.
        world_size: number of workers.
        batch_size: rows per forward.
        device: of the models.
        has_teacher: False where the teacher is but its samples, which are of no held-out rows: then
            cross-entropy is all there is.
    """

    def __init__(
        self, store: TokenStore, rank: int, world_size: int, batch_size: int, device: str,
        has_teacher: bool = True,
    ) -> None:  # fmt: skip
        self._figures = FIGURES if has_teacher else ("ce",)
        self._weights = LossWeights(kl=float(has_teacher), ce=1.0)
        self._batch_size, self._device = batch_size, device
        self._own: dict[str, TokenRows] = {}
        first = 0
        for source in store.sources:
            share = max(1, source.num_rows // world_size)
            start = first + (rank * share) % source.num_rows  # fewer rows than workers: repeated
            self._own[source.name] = store.rows(range(start, start + share))
            first += source.num_rows

    @torch.no_grad()
    def score(
        self, forward: Forward, summed: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, dict[str, float | None]]:
        """Domain -> means over its tokens of `FIGURES`; all workers call it.

        What needs a teacher is None without one.

        Args:
            forward: the figures of some rows, sums over tokens divided by the counts given.
            summed: adds up a tensor over the workers.
        """
        one = TokenCounts(1.0, 1.0)
        found: dict[str, dict[str, float | None]] = {}
        for name, rows in self._own.items():
            counts = TokenCounts.of(rows)
            sums = torch.zeros(len(self._figures), dtype=torch.float64, device=self._device)
            for batch in rows.split(self._batch_size):
                values = forward(batch.to(self._device), self._weights, one)
                sums += torch.stack([values[figure].double() for figure in self._figures])
            parts = torch.tensor([counts.kl, counts.ce], dtype=torch.float64)
            *totals, num_kl, num_ce = summed(torch.cat([sums, parts.to(sums.device)])).tolist()
            means: dict[str, float | None] = dict.fromkeys(FIGURES)
            for figure, value in zip(self._figures, totals, strict=True):
                means[figure] = value / (num_ce if figure == "ce" else num_kl)
            found[name] = means
        return found


def as_metrics(scores: dict[str, dict[str, float | None]], stage: str) -> dict[str, Any]:
    """Flat names for the tracker, of what there is."""
    return {
        f"{stage}/heldout_{figure}/{name}": value
        for name, values in scores.items()
        for figure, value in values.items()
        if value is not None
    }
