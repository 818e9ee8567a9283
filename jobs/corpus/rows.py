"""Token rows of a run's text: sources mixed by weight, split from the held-out part, tokenised."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from conf.options.data import DataConfig, parse_mix
from jobs.corpus.builtin import text_digest
from jobs.corpus.sources import (
    Which,
    gives_heldout,
    heldout_digests,
    open_source,
    rest_of,
    source_of,
    uses_mix,
)
from sparsify.data.crops import crop_rows
from sparsify.data.order import largest_remainder
from sparsify.data.rows import TokenRows, token_rows
from sparsify.errors import CalibrationError, InputError

_LEAST_CALIBRATION_SHARE = 0.25  # of the rows asked for; less gives statistics not worth using

_ASKED_BY = {
    "calibration": "samples (num_samples)",
    "train": "tokens (num_tokens)",
    "heldout": "tokens (num_tokens, or heldout_tokens of a training)",
}


def load_rows(
    config: DataConfig,
    which: Which,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    seed: int,
) -> tuple[TokenRows, str | None]:
    """Token rows for one use of the data.

    Calibration and training take the documents in an order shuffled by `seed`; held-out documents
    come in one shuffled order that is always the same, so that a part of them stands for all.
    Calibration takes its rows from all over the text (`sparsify.data.crops`), or, where a source
    has less than about twice the text that it needs, from the beginning. Documents are read and
    tokenised only as far as they are needed.
    A training source that is too short is repeated, in a new order every time, each pass packed by
    itself. A document equal to a held-out one is never used for calibration or training.
    A mix gives rows of each of its sources in proportion to the weights, in an order that depends
    on `seed` and has the same proportions all along. No row holds text of two sources.

    Args:
        config: the sources, `sequence_length` and `isolate_documents`.
        which: calibration, train or heldout.
        tokenizer: of the model that will read the rows.
        num_rows: rows wanted.
        seed: orders the documents.

    Returns:
        The rows, and a warning for the user when a source was too short for what was asked, else
        None. Training and mixes have always `num_rows` rows; the others may have fewer.

    Raises:
        CalibrationError: calibration text for less than a quarter of the rows; of a mix, for less
            than all rows of a source.
        InputError: not one row of text for the other uses, a source of a mix that gets no row, or
            a source that cannot be read.
    """
    reader = _Reader(config, which, tokenizer, seed)
    if uses_mix(config, which):
        rows, warning = _mixed_rows(reader, num_rows)
    else:
        name, held_out = source_of(config, which)
        field = "calibration" if getattr(config, which) is None else which
        rows, warning = reader.rows(field, name, held_out, num_rows)
    return (rows if config.isolate_documents else TokenRows.whole(rows.ids_NT)), warning


def _mixed_rows(reader: _Reader, num_rows: int) -> tuple[TokenRows, str | None]:
    """Rows of every source of the mix, interleaved."""
    config = reader.config
    mix = parse_mix("data.mix", config.mix)
    counts = largest_remainder([share for share, _ in mix], num_rows)
    parts, warnings = [], []
    for (share, name), count in zip(mix, counts, strict=True):
        if count == 0:
            raise InputError(
                f"data.mix={name}: its share of {num_rows} rows is {share * num_rows:.2g} rows; "
                f"ask for more {_ASKED_BY[reader.which]}, raise its weight or leave it out"
            )
        rows, warning = reader.rows("mix", name, rest_of(config), count)
        parts.append(rows)
        warnings += [warning] if warning else []
    order = _interleaved(counts, _order_seed(reader.which, reader.seed, 0))
    return TokenRows.joined(parts)[order], "; ".join(warnings) or None


def _interleaved(counts: Sequence[int], seed: int) -> torch.Tensor:
    """An order of sum(counts) rows in which every stretch holds about its share of each part.

    Row j of a part of n is put at a random place of the j-th of n equal stretches, not in its
    middle: with regular places and two workers, one might get all the rows of one source.
    """
    generator = torch.Generator().manual_seed(seed)
    places = [
        (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
        for count in counts
    ]
    return torch.cat(places).argsort(stable=True)


class _Reader:
    """Rows out of one source after another, for one use of the data."""

    def __init__(
        self, config: DataConfig, which: Which, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> None:
        self.config = config
        self.which = which
        self.seed = seed
        self._tokenizer = tokenizer

    def rows(
        self, field: str, name: str, held_out: bool | None, num_rows: int
    ) -> tuple[TokenRows, str | None]:
        """`num_rows` rows of the source `name`, which data.`field` names; see `load_rows`."""
        rows = self._pass(name, held_out, num_rows, 0)
        if len(rows) == num_rows:
            return rows, None
        length = self.config.sequence_length
        part = {
            True: "the held-out part has",
            False: "the part not held out has",
            None: "it has",
        }[held_out]
        least = 1
        if self.which == "calibration":
            share = 1 if field == "mix" else _LEAST_CALIBRATION_SHARE
            least = max(1, math.ceil(num_rows * share))
        if len(rows) < least:
            texts = self._documents(name, held_out, None)
            num_tokens = token_rows(texts, self._tokenizer, 2).num_tokens  # up to an odd last one
            kind = CalibrationError if self.which == "calibration" else InputError
            advice = f"or ask for fewer {_ASKED_BY[self.which]}"
            if self.which == "heldout":
                advice = "a larger data.heldout_share, or other text with data.heldout=FILE"
            raise kind(
                f"data.{field}={name}: {part} {num_tokens} tokens; {num_rows} rows of {length} "
                f"need {num_rows * length}, and at least {least * length} are required; give more "
                f"text, a shorter data.sequence_length, {advice}"
            )
        has = (
            f"data.{field}={name}: {part} {len(rows)} rows of {length} tokens, {num_rows} were "
            "asked for"
        )
        if self.which != "train":
            return rows, f"{has}; all of them are used"
        passes = [rows]
        while (missing := num_rows - sum(map(len, passes))) > 0:
            passes.append(self._pass(name, held_out, missing, len(passes)))
        times = num_rows / len(rows)
        return TokenRows.joined(passes), f"{has}; the text is used {times:.1f} times"

    def _pass(self, name: str, held_out: bool | None, num_rows: int, epoch: int) -> TokenRows:
        # Not the run's seed for held-out text: scores of runs with different seeds are comparable.
        seed = _order_seed(self.which, 0 if self.which == "heldout" else self.seed, epoch)
        length = self.config.sequence_length

        def texts() -> Iterator[str]:
            return self._documents(name, held_out, seed)

        rows = None
        if self.which == "calibration":
            rows = crop_rows(texts(), self._tokenizer, length, num_rows, seed)
        if rows is None:
            rows = token_rows(texts(), self._tokenizer, length, num_rows)
        return rows

    def _documents(self, name: str, held_out: bool | None, order_seed: int | None) -> Iterator[str]:
        """The documents; for calibration and training without those equal to a held-out one."""
        texts = open_source(name, held_out, self.config, order_seed)
        if self.which == "heldout" or gives_heldout(self.config, name):
            return texts
        return (text for text in texts if text_digest(text) not in self._held)

    @cached_property
    def _held(self) -> set[bytes]:
        return heldout_digests(self.config)


def _order_seed(which: Which, seed: int, epoch: int) -> int:
    """A seed of its own for every use and pass, so that no two runs share an order by accident."""
    digest = hashlib.sha256(f"{which}:{seed}:{epoch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
