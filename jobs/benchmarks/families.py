"""Decoder-only families of transformers, small and at random, through every stage."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from jobs.benchmarks.sides.family import STAGES, examine
from jobs.benchmarks.support.arguments import add_option, settings_of
from jobs.benchmarks.support.commands import markdown_table, percent
from jobs.benchmarks.support.families import FAMILIES, SKIP
from jobs.benchmarks.support.record import Outcome, Table, Target
from sparsify.errors import InputError
from sparsify.files import embedded_path
from sparsify.models.load import load_tokenizer

SUMMARY = "model families, small and at random: pruned, recovered, quantised, exported, reloaded"

EXAMPLES = ("families --output docs/families.md --save",)

_LEAST_DONE = 30

_NOTES = (
    "each model is made with transformers' own config class, a few blocks of width 32 with random "
    "weights, saved as transformers saves it, and taken through the functions that the stages "
    "call; that shows what a family's shape allows, and nothing of quality",
    "prune: method twofour to 2:4 without rotations; the share of all weights that is zero "
    "afterwards, embeddings and what stays dense included: of a large model with fewer tokens per "
    "weight it is larger",
    "recover: the KL to the dense model before the first of four steps, and before the last",
    "quantize: INT4, packed, unpacked: the largest difference of a logit to the model that was "
    "packed; export: the same of the folder that transformers loads, and of the packed one; where "
    "transformers computes experts fused, sums in another order may differ by 1e-6",
    "after each of the four, every group in the files was checked: 0 pruned weights are alive",
    "documents apart: whether documents joined into one row do not see each other; no: "
    "data.isolate_documents=false is needed",
    "block by block: whether one block is in memory at a time while pruning, which resumes at its "
    "block after a kill; no: the files name or hold tensors otherwise than transformers does",
    "names kept: whether the exported tensors have the names that the checkpoint's have",
    "stays dense: matrices inside the decoder blocks that are not pruned, with their share of all "
    "weights; embeddings, head and what else is outside the blocks is dense in every family",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    names = "families, by model_type (default: all)"
    parser.add_argument("--families", nargs="+", metavar="NAME", default=list(FAMILIES), help=names)
    page = "Markdown file for the table, such as docs/families.md"
    parser.add_argument("--output", type=Path, dest="markdown", metavar="FILE.md", help=page)
    add_option(parser, "--threads", 1, "CPU threads")


def run(options: Namespace) -> Outcome:
    """Take every family through all stages, and write the table.

    Raises:
        InputError: a family that is not known.
    """
    if unknown := sorted(set(options.families) - set(FAMILIES)):
        raise InputError(f"--families {unknown[0]}: use some of {', '.join(FAMILIES)}")
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(embedded_path())
    figures = {}
    for name in options.families:
        with tempfile.TemporaryDirectory(dir=options.workdir, prefix="family-") as folder:
            figures[name] = examine(name, Path(folder), tokenizer)
        print(f"{name}: {', '.join(_cell(figures[name], stage) for stage in STAGES)}", flush=True)
    settings = settings_of(options, "families")
    done = sum(is_done(found) for found in figures.values())
    targets = [Target.at_least("families done in every stage", _LEAST_DONE, done)]
    targets.append(
        Target.at_most(
            "stages that ended in an error not meant for a person", 0,
            sum("failed" in found.get(stage, {}) for found in figures.values() for stage in STAGES),
        )
    )  # fmt: skip
    if options.markdown is not None:
        options.markdown.write_text(markdown(figures, options.command), encoding="utf-8")
    tables = tables_of(figures)
    return Outcome("cpu", options.threads, settings, figures, tables, targets, list(_NOTES))


def is_done(found: dict[str, Any]) -> bool:
    """Whether a family went through every stage."""
    return all(stage in found and "num_violations" in found[stage] for stage in STAGES)


def _cell(found: dict[str, Any], stage: str) -> str:
    part = found.get(stage)
    if part is None:
        return "–"
    if "num_violations" not in part:
        return "refused" if "refused" in part else "failed"
    if stage == "prune":
        return percent(part["zero_share"])
    if stage == "recover":
        return f"{part['losses'][0]:.2g} → {part['losses'][-1]:.2g}"
    return f"{part['difference']:.2g}"


def _dense(found: dict[str, Any]) -> str:
    """What stays dense in the blocks, the largest first."""
    shown = sorted(found.get("dense", {}).items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {percent(share)}" for name, share in shown)


def tables_of(figures: dict[str, dict[str, Any]]) -> list[Table]:
    """What was done of every family; and the reasons for what was not, or not as usual."""
    rows = []
    for name, found in figures.items():
        cells = [_cell(found, stage) for stage in STAGES]
        apart = "no" if found["isolates"] else "yes"
        whole = "no" if found["held_whole"].get("why", True) else "yes"
        kept = {True: "yes", False: "no", None: "–"}[found.get("export", {}).get("has_same_names")]
        rows.append((name, *cells, apart, whole, kept, _dense(found)))
    headings = (
        "family", *STAGES, "documents apart", "block by block", "names kept", "stays dense",
    )  # fmt: skip
    reasons = []
    for name, found in figures.items():
        for stage in STAGES:
            part = found.get(stage, {})
            if why := part.get("refused") or part.get("failed"):
                reasons.append((name, stage, why))
        if name in SKIP:
            reasons.append((name, "prune", f"done with prune.skip={SKIP[name]}".replace("'", "")))
    return [Table(headings, rows), Table(("family", "stage", "reason"), reasons)]


def markdown(figures: dict[str, dict[str, Any]], command: str) -> str:
    """The tables as a Markdown page, with the command that made them."""
    done = sum(is_done(found) for found in figures.values())
    families, reasons = (markdown_table(table) for table in tables_of(figures))
    parts = [
        "# Model families",
        f"{len(figures)} families of transformers, of which {done} pass every stage. Made by\n\n"
        f"```\n{command}\n```",
        "\n".join(f"- {note}" for note in _NOTES),
        f"## What was done\n\n{families}",
        f"## What was refused, and why\n\n{reasons}",
    ]
    return "\n\n".join(parts) + "\n"
