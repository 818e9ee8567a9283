"""From documents to fixed-length token rows.

Owns tokenisation and packing. Knows nothing of where documents come from: an iterable of strings
goes in, rows of token ids come out, and the same strings give the same rows on any machine.
Shape suffixes: N rows, T tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_TOKENS = 1024
"""tokens whose float32 logits exist at one time"""

_BATCH_DOCUMENTS = 64

_BATCH_CHARS = 256_000  # so that one long book does not make a reader of one row wait

# A text longer than this is tokenised in windows, for tokenizers take 180 bytes of memory and 2
# microseconds a character: those of a book of 1 GB at once would take 180 GB.
_LONG_CHARS = 1_000_000

_WINDOW_CHARS = 100_000

_OVERLAP_CHARS = 4_000  # of neighbouring windows: words of half of it are tokenised as in the whole

_SAME_TOKENS = 8  # in a row, of two windows, where one is left for the other

# Scripts, digits, spaces, code, cases: whatever tokenizers are known to treat differently.
_PROBE = (
    "The quick brown fox JUMPS over 13 lazy dogs; it's 3.14159 o'clock, isn't it?\n\n\tdef f(x_1):"
    "\n        return x_1 ** 2  # two  spaces   three\r\nÄrger über Straßen, déjà vu, naïve "
    "ﬁne; Привет, мир! 你好，世界。こんにちは 안녕하세요 مرحبا שלום नमस्ते 😀👍🏽 ∑∫≠ 1234567890 "
    "0x1F http://example.org/a?b=c&d=e CamelCase snake_case ALLCAPS don't We'LL\u00a0x\u200by <s> "
    "</s> <|endoftext|> [CLS] ...!!! ---- ==== \\n {} [] () <> ~`@#$%^&*"
)


def chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices of `chunk_tokens` tokens, the last one of what is left."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of tokens without padding, and where inside its document each token is.

    A model that is given both as `input_ids` and `position_ids`, with `use_cache=False` and without
    an attention mask, lets no document of a row attend to another (see `models.isolation`).
    """

    ids_NT: Tensor
    """int64 token ids"""
    positions_NT: Tensor
    """int64 positions; 0 at the first token of every document and of every row"""
    host_NT: Tensor | None = None
    """the positions in host memory, where `to` has moved them from there and they are at hand"""
    is_answer_NT: Tensor | None = None
    """bool: tokens that a model is to learn to predict, the answers of a conversation; None: all"""

    @classmethod
    def whole(cls, ids_NT: Tensor) -> TokenRows:
        """Rows that are one document each: positions 0 to T - 1."""
        if ids_NT.ndim != 2:
            raise InputError(f"token rows of shape {tuple(ids_NT.shape)}; expected (rows, tokens)")
        positions_T = torch.arange(ids_NT.shape[1], device=ids_NT.device)
        return cls(ids_NT, positions_T.expand(ids_NT.shape).contiguous())

    @classmethod
    def joined(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """The rows of all parts, one part after another; they must be of one length."""
        answers = [part.is_answer_NT for part in parts if part.is_answer_NT is not None]
        assert len(answers) in (0, len(parts)), "answers are marked in all parts or in none"
        return cls(
            torch.cat([part.ids_NT for part in parts]),
            torch.cat([part.positions_NT for part in parts]),
            is_answer_NT=torch.cat(answers) if answers else None,
        )

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __getitem__(self, index: slice | Tensor) -> TokenRows:
        host_NT = None
        if self.host_NT is not None and isinstance(index, slice):
            host_NT = self.host_NT[index]
        answers = self.is_answer_NT
        return TokenRows(
            self.ids_NT[index], self.positions_NT[index], host_NT,
            None if answers is None else answers[index],
        )  # fmt: skip

    def split(self, num_rows: int) -> list[TokenRows]:
        """Pieces of `num_rows` rows, the last one of what is left."""
        return [self[start : start + num_rows] for start in range(0, len(self), num_rows)]

    @property
    def has_next_NT(self) -> Tensor:
        """bool (N, T): the next token of the row belongs to the same document, and is to be
        learned."""
        has_next_NT = torch.zeros_like(self.positions_NT, dtype=torch.bool)
        has_next_NT[:, :-1] = self.positions_NT[:, 1:] != 0
        if self.is_answer_NT is not None:
            has_next_NT[:, :-1] &= self.is_answer_NT[:, 1:]
        return has_next_NT

    @property
    def is_taught_NT(self) -> Tensor:
        """bool (N, T): what a teacher may be compared at. It needs no next token, so unlike in
        `has_next_NT` the last position of a row counts; the end of a document inside does not.
        Where answers are marked, what would be predicted there is not known to be one."""
        is_taught_NT = self.has_next_NT
        if self.is_answer_NT is None:
            is_taught_NT[:, -1] = True
        return is_taught_NT

    @property
    def is_used_NT(self) -> Tensor | None:
        """bool (N, T): tokens of documents with an answer in them, not those that fill a row up;
        None: all."""
        if self.is_answer_NT is None:
            return None
        is_start_NT = self.positions_NT == 0
        is_start_NT[:, 0] = False
        document_NT = is_start_NT.cumsum(1)
        num_answers_NT = torch.zeros_like(document_NT).scatter_add_(
            1, document_NT, self.is_answer_NT.long()
        )
        return num_answers_NT.gather(1, document_NT) > 0

    @property
    def is_joined(self) -> bool:
        """Whether any row holds more than one document."""
        return bool((self.positions_NT[:, 1:] == 0).any())

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows together."""
        return self.ids_NT.numel()

    def to(self, device: torch.device | str) -> TokenRows:
        """The same rows on `device`."""
        host_NT = self.positions_NT if self.positions_NT.device.type == "cpu" else self.host_NT
        answers = self.is_answer_NT
        return TokenRows(
            self.ids_NT.to(device), self.positions_NT.to(device), host_NT,
            None if answers is None else answers.to(device),
        )  # fmt: skip


def _encoded(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], bool]]:
    """Token ids of each document with one mark between documents, and whether one begins there.

    A long document comes in several parts. The mark is the beginning token where the tokenizer sets
    one itself, else the end-of-text token: both together make pairs that no model has seen in
    training.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    batch: list[str] = []
    num_chars = 0

    def has_mark(first: list[int], last: list[int]) -> bool:
        is_begun = begin is not None and first[:1] == [begin]
        return end is None or is_begun or last[-1:] == [end]

    def flush() -> Iterator[tuple[list[int], bool]]:
        for ids in tokenizer(batch, verbose=False)["input_ids"] if batch else []:
            yield (ids if not ids or has_mark(ids, ids) else [*ids, end]), True

    for text in documents:
        if len(text) > _LONG_CHARS and tokenizer.is_fast:  # the others do not say where tokens lie
            yield from flush()
            batch, num_chars = [], 0
            first: list[int] = []
            for ids in _in_windows(text, tokenizer):
                yield ids, not first
                first, last = first or ids, ids
            if first and not has_mark(first, last):
                yield [end], False
            continue
        batch.append(text)
        num_chars += len(text)
        if len(batch) == _BATCH_DOCUMENTS or num_chars > _BATCH_CHARS:
            yield from flush()
            batch, num_chars = [], 0
    yield from flush()


@dataclass(frozen=True)
class _Window:
    """The tokens of a part of a text."""

    ids: list[int]
    places: list[int]
    """the character of the text at which each begins, in their order"""

    @classmethod
    def of(cls, text: str, begin: int, end: int, tokenizer: PreTrainedTokenizerBase) -> _Window:
        """The part from `begin` to before `end`; marks at its ends, where they are the text's."""
        found = tokenizer(
            [text[begin:end]], verbose=False, return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )  # fmt: skip
        ids, is_mark = found["input_ids"][0], found["special_tokens_mask"][0]
        places = [begin + start for start, _ in found["offset_mapping"][0]]
        num_before = is_mark.index(0) if 0 in is_mark else len(ids)
        num_behind = is_mark[::-1].index(0) if 0 in is_mark else 0
        places[:num_before] = [begin] * num_before
        places[len(ids) - num_behind :] = [end] * num_behind
        kept = slice(num_before if begin else 0, len(ids) - (num_behind if end < len(text) else 0))
        return cls(ids[kept], places[kept])

    def seam(self, other: _Window, least: int) -> tuple[int, int] | None:
        """Where both go on alike: a token of each, the first at `least` or behind it."""
        mine, theirs = bisect_left(self.places, least), bisect_left(other.places, least)
        while mine + _SAME_TOKENS <= len(self.ids) and theirs + _SAME_TOKENS <= len(other.ids):
            gap = self.places[mine] - other.places[theirs]
            alike = (
                self.ids[mine : mine + _SAME_TOKENS] == other.ids[theirs : theirs + _SAME_TOKENS]
            )
            if gap == 0 and alike:
                return mine, theirs
            mine, theirs = mine + (gap <= 0), theirs + (gap >= 0)
        return None


def _in_windows(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of a long text, those of one window after another.

    Neighbours overlap, and one takes over from the other where both say the same, with text enough
    on either side: the ids are those of the whole text. A word longer than half the overlap may be
    cut in another way than in the whole.
    """
    begin, end, first = 0, _WINDOW_CHARS, 0
    window = _Window.of(text, begin, end, tokenizer)
    while end < len(text):
        middle = end - _OVERLAP_CHARS // 2
        begin, end = end - _OVERLAP_CHARS, min(len(text), end - _OVERLAP_CHARS + _WINDOW_CHARS)
        following = _Window.of(text, begin, end, tokenizer)
        seam = window.seam(following, middle)
        if seam is None:
            last = bisect_left(window.places, middle)
            begin = window.places[last] if last < len(window.ids) else middle
            seam = last, 0
            following = _Window.of(text, begin, end, tokenizer)
        yield window.ids[first : seam[0]]
        window, first = following, seam[1]
    yield window.ids[first:]


def token_rows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_rows: int | None = None,
) -> TokenRows:
    """Pack documents one after another into rows of `sequence_length` tokens, without padding.

    A document that does not end with its row continues in the next one, where its positions start
    again at 0: what a model cannot see does not count.

    Args:
        documents: texts in the order in which they are to be used; consumed only as far as needed.
        tokenizer: its end-of-text token is put after every document, unless it has none or starts
            documents with a beginning token itself. The mark belongs to the document it ends, or
            begins.
        sequence_length: tokens per row.
        num_rows: stop after this many rows; None takes every whole row there is.

    Returns:
        Rows of `sequence_length` tokens; the unfinished last row is dropped, so there are none when
        the documents hold fewer tokens than one row.
    """
    if sequence_length < 2:
        raise InputError(f"sequence_length: {sequence_length} is too short; use at least 2 tokens")
    wanted = None if num_rows is None else num_rows * sequence_length
    stream = token_stream(documents, tokenizer, wanted)
    rows = len(stream.ids) // sequence_length
    if num_rows is not None:
        rows = min(rows, num_rows)
    shape = (rows, sequence_length)
    ids_NT = torch.tensor(stream.ids[: rows * sequence_length], dtype=torch.int64).reshape(shape)
    return TokenRows(ids_NT, _positions(stream.starts, rows, sequence_length))


@dataclass(frozen=True)
class TokenStream:
    """Documents one after another, before they are cut into rows."""

    ids: array[int]
    """token ids, 8 bytes each"""
    starts: array[int]
    """where in `ids` each document begins"""


def token_stream(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int | None = None
) -> TokenStream:
    """The tokens of all documents with the marks that `token_rows` describes.

    Args:
        documents: texts; one without tokens leaves no trace.
        tokenizer: of the model that will read them.
        num_tokens: stop after the document, or the window of a long one, that reaches this many;
            None takes all.

    Cost: memory for the tokens, one document, and what the tokenizer takes for a million
    characters.
    """
    stream = TokenStream(array("q"), array("q"))
    for ids, is_start in _encoded(documents, tokenizer):
        if ids and is_start:
            stream.starts.append(len(stream.ids))
        stream.ids.extend(ids)
        if num_tokens is not None and len(stream.ids) >= num_tokens:
            break
    return stream


def _positions(starts: Sequence[int], num_rows: int, sequence_length: int) -> Tensor:
    """Distance of each token from the last document start or row start at or before it (N, T)."""
    num_tokens = num_rows * sequence_length
    last_start = torch.zeros(num_tokens, dtype=torch.int64)
    for begins in (
        torch.tensor(starts, dtype=torch.int64),
        torch.arange(num_rows) * sequence_length,
    ):
        inside = begins[begins < num_tokens]
        last_start[inside] = inside
    last_start = last_start.cummax(0).values if num_tokens else last_start
    return (torch.arange(num_tokens) - last_start).reshape(num_rows, sequence_length)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of what a tokenizer does: its vocabulary, its marks, and a text full of traps.

    Not of its files: saving a tokenizer again, or with another version of the library, may change
    their bytes and nothing else.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    parts = [
        vocabulary,
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        [list(tokenizer(text, verbose=False)["input_ids"]) for text in (_PROBE, "x", "")],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id plus 1."""
    return max(tokenizer.get_vocab().values()) + 1
