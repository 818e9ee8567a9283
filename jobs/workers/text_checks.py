"""Whether there is text enough for all stages of a command, asked before the first one starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from conf.schema import Config
from jobs.corpus.rows import load_rows
from jobs.corpus.sources import Which
from jobs.corpus.survey import Texts
from jobs.runs.models import Models
from jobs.training.heldout import domains
from jobs.training.inputs import given_store
from jobs.workers.prune_inputs import NUM_HELD_ROWS
from sparsify.errors import InputError
from sparsify.models.load import load_tokenizer


def check_texts(config: Config, models: Models, say: Callable[[str], None]) -> Texts:
    """Look at every document that the stages may read, and make the rows that each needs at least.

    Args:
        config: of the run.
        models: whose dense one has the tokenizer.
        say: told what of the text is left out or replaced.

    Returns:
        What was found in the sources, for the stages to ask again.

    Raises:
        InputError: a source or a document that cannot be read, or too little text for a stage.
    """
    texts = Texts(config.data)
    wanted = _wanted_rows(config)
    said: set[str] = set()
    for which in wanted:
        texts.fingerprint(which)
        lines = [line for line in texts.remarks(which) if line not in said]
        said.update(lines)
        for line in lines:
            say(f"warning: {line}")
    if not wanted or "pretrain" in config.stages:  # whose tokenizer may be made of this text
        return texts
    tokenizer = load_tokenizer(models.dense)
    for which, num_rows in wanted.items():
        if num_rows:
            _check_rows(config, which, tokenizer, num_rows)
    if "distill" in config.stages and config.distill.heldout_every_steps is not None:
        for data in domains(config.data).values():
            _check_rows(replace(config, data=data), "heldout", tokenizer, 1)
    return texts


def _wanted_rows(config: Config) -> dict[Which, int]:
    """Rows for each use of the text in the run's stages; of training text, which repeats, one."""
    found: dict[Which, int] = {}
    stages, prune = config.stages, config.prune
    num_samples = [prune.num_samples + (NUM_HELD_ROWS if prune.budget else 0)] * ("prune" in stages)
    num_samples += [config.drop.rows] * ("drop" in stages and config.drop.reads_rows)
    num_samples += [config.quantize.num_samples] * ("quantize" in stages)
    if num_samples:
        found["calibration"] = max(num_samples)
    if {"distill", "pretrain"}.intersection(stages) and given_store(config) is None:
        found["train"] = 1
    if {"pretrain", "evaluate", "quantize"}.intersection(stages):
        found["heldout"] = config.evaluate.num_tokens // config.data.sequence_length
    elif config.data.heldout is not None and found:
        found["heldout"] = 0  # read for what must not be trained on
    return found


def _check_rows(
    config: Config, which: Which, tokenizer: PreTrainedTokenizerBase, num_rows: int
) -> None:
    rows, _ = load_rows(config.data, which, tokenizer, num_rows, config.run.seed)
    if which == "heldout" and not rows.has_next_NT.any():
        raise InputError(
            "held-out text: not one token in it that follows another of its document in a row of "
            f"data.sequence_length={config.data.sequence_length}; give longer documents with "
            "data.heldout=FILE"
        )
