"""A task made for small models, and how well a model answers it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from jobs.corpus.chats import Chats
from jobs.corpus.documents import Remarks
from jobs.corpus.templates import Renderer, examples_of, template_of
from sparsify.data.examples import pack
from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.files import written_whole
from sparsify.models.calls import logits_of
from sparsify.models.load import load_model, load_tokenizer

TEMPLATE = "raw"
"""of the records: prompt, answer, end token"""

_LETTERS = "abcdefghijklmnop"

_ROW_TOKENS = 64  # more than a record has, whatever a tokenizer makes of it

_BATCH = 256


def make_records(num_letters: int, num_train: int, num_heldout: int, seed: int) -> dict[str, list]:
    """Letters to be put in order: `{"prompt": " d b a c ->", "completion": " a b c d"}`.

    Args:
        num_letters: of a record, different ones of sixteen.
        num_train: records to learn from.
        num_heldout: others, to be asked for; no prompt is in both.
        seed: of the choice.

    Returns:
        "train" and "heldout": records.

    Raises:
        InputError: there are not so many letters, or not so many prompts.
    """
    if not 1 <= num_letters <= len(_LETTERS):
        raise InputError(f"--letters {num_letters}: must be 1 to {len(_LETTERS)}")
    if (most := math.perm(len(_LETTERS), num_letters)) < 2 * (num_train + num_heldout):
        raise InputError(
            f"--records {num_train} with --heldout {num_heldout}: of {num_letters} letters there "
            f"are {most} records, of which half at most are taken; use fewer or more --letters"
        )
    generator = random.Random(seed)  # the same everywhere, and no secret  # noqa: S311
    prompts: dict[str, dict[str, str]] = {}
    while len(prompts) < num_train + num_heldout:
        letters = generator.sample(_LETTERS, num_letters)
        prompt = "".join(f" {letter}" for letter in letters) + " ->"
        answer = "".join(f" {letter}" for letter in sorted(letters))
        prompts[prompt] = {"prompt": prompt, "completion": answer}
    records = list(prompts.values())
    return {"heldout": records[:num_heldout], "train": records[num_heldout:]}


def write_records(records: list[dict[str, str]], path: Path) -> None:
    """Write records as JSON lines."""
    with written_whole(path) as temporary:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        temporary.write_text(lines, encoding="utf-8")


def score_answers(folder: Path | str, records: Path) -> dict[str, float]:
    """How well a model answers records: exact match and loss.

    An answer matches if each of its tokens, the end token included, is the likeliest one behind
    the prompt and the answer so far. That is when a model that always writes the likeliest token
    writes this answer, so one forward says it of all tokens at once.

    Args:
        folder: of the model.
        records: JSON lines of the form prompt/completion.

    Returns:
        "exact_match": share of the records; "loss": cross-entropy in nats, mean over the tokens of
        all answers; "num_records".
    """
    tokenizer = load_tokenizer(folder)
    renderer = Renderer(tokenizer, template_of(tokenizer, TEMPLATE))
    chats = Chats(str(records), [], "text")
    examples = list(examples_of(chats, renderer, _ROW_TOKENS, Remarks()))
    length = max(len(example.ids_T) for example in examples)
    rows = pack(examples, length, tokenizer.eos_token_id or 0, together=False)
    model = load_model(folder)
    found = [_scored(model, batch) for batch in rows.split(_BATCH)]
    matches, losses, tokens = (sum(values) for values in zip(*found, strict=True))
    return {
        "exact_match": matches / len(rows), "loss": losses / tokens, "num_records": len(rows),
    }  # fmt: skip


@torch.inference_mode()
def _scored(model: torch.nn.Module, rows: TokenRows) -> tuple[int, float, int]:
    """Rows answered exactly, summed loss and number of the answers' tokens."""
    is_asked_NT = rows.has_next_NT[:, :-1]
    logits_NTV = logits_of(model, rows)[:, :-1]
    targets_NT = rows.ids_NT[:, 1:]
    is_right_NT = logits_NTV.argmax(-1) == targets_NT
    is_match_N = (is_right_NT | ~is_asked_NT).all(1)
    loss = cross_entropy(logits_NTV[is_asked_NT].double(), targets_NT[is_asked_NT], reduction="sum")
    return int(is_match_N.sum()), float(loss), int(is_asked_NT.sum())
