"""What a run's tokenizer makes of the run's text: asked before anything is computed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conf.options.data import DataConfig
from jobs.corpus.sources import open_source, source_of, training_sources, uses_mix
from sparsify.data.store import is_store
from sparsify.errors import InputError
from sparsify.models.tokenizer import beyond_embedding, difference, first_difference

_NUM_DOCUMENTS = 8
"""of a source, on which two ways to read one tokenizer are compared"""

_NUM_CHARS = 20_000


def check_tokens(
    data: DataConfig, with_training: bool, tokenizer: PreTrainedTokenizerBase, folder: Path,
    num_rows: int,
) -> list[str]:  # fmt: skip
    """Require that text becomes the tokens that the model was trained with.

    Args:
        data: the text.
        with_training: whether that for recovery is read too.
        tokenizer: as `models.load.read_tokenizer` gives it.
        folder: of its model.
        num_rows: of the model's embedding.

    Returns:
        What is to be said of special tokens that the model has no embedding for, in a line.

    Raises:
        InputError: the first documents become other ids than tokenizer.json's own rules give; or
            a text holds a token that the model has no embedding for.

    Cost: reads a few documents of each source; all of them where there are such tokens.
    """
    sources = read_as_text(data, with_training)
    if type(tokenizer) is not PreTrainedTokenizerFast and (folder / "tokenizer.json").is_file():
        own = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        special = set(tokenizer.get_added_vocab())  # families differ in what is around these
        for name, held_out in sources:
            first = islice(open_source(name, held_out, data), _NUM_DOCUMENTS)
            texts = (text[:_NUM_CHARS] for text in first)
            plain = (text for text in texts if not any(word in text for word in special))
            if (text := first_difference(tokenizer, own, plain)) is not None:
                raise InputError(
                    f"model folder {folder}: transformers' {type(tokenizer).__name__} makes other "
                    f"ids of {name} than tokenizer.json says "
                    f"({difference(tokenizer, own, text)}); if transformers is right, save it "
                    "again: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )
    beyond = beyond_embedding(tokenizer, num_rows)
    if not beyond:
        return []
    for name, held_out in sources:
        for text in open_source(name, held_out, data):
            if (found := next((word for word in beyond if word in text), None)) is not None:
                raise InputError(
                    f"{name}: a document ({text[:40]!r}) holds {found!r}, a special token of id "
                    f"{beyond[found]}, and the model has {num_rows} embedding rows; take it out of "
                    "the text, or use the tokenizer that belongs to this model"
                )
    example = next(iter(beyond))
    return [
        f"{len(beyond)} special tokens have ids beyond the {num_rows} embedding rows, such as "
        f"{example!r}; no text of this run holds one"
    ]


def read_as_text(data: DataConfig, with_training: bool) -> list[tuple[str, bool | None]]:
    """(name, held_out) for `open_source` of everything that is read as text."""
    found = [source_of(data, "heldout")]
    if uses_mix(data, "calibration"):
        found += [(name, held_out) for _, name, held_out in training_sources(data)]
    else:
        found.append(source_of(data, "calibration"))
    if with_training and data.train is not None:
        found.append(source_of(data, "train"))
    return [source for source in dict.fromkeys(found) if not is_store(source[0])]
