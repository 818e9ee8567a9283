"""The text of a record: which of its fields hold it, in the shapes that data sets come in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sparsify.errors import InputError

SHAPES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("text",), ()),
    (("messages",), ()),
    (("conversations",), ()),  # ShareGPT, LIMA
    (("prompt", "completion"), ()),
    (("instruction", "output"), ("input",)),  # Alpaca, Open-Platypus
    (("instruction", "response"), ("context",)),  # Dolly
    (("question", "answer"), ()),
    (("document", "summary"), ()),
    (("history", "response"), ("knowledge",)),  # FaithDial
    (("content",), ()),
)
"""(fields that must be there, fields that may be): the first shape that fits is the record's"""

_CONTENT = ("content", "value", "text")
"""of a message: what it says, beside its role"""


def record_text(record: dict[str, Any], fields: Sequence[str], place: str) -> str:
    """What is judged of a record: the strings of its fields, one after another.

    Args:
        record: any.
        fields: which; [] finds them by `SHAPES`.
        place: for messages.

    Raises:
        InputError: it has no such field, no shape that is known, or something else than text in it.
    """
    if not fields:
        fields = _found_fields(record, place)
    parts = []
    for name in fields:
        if name not in record:
            raise InputError(
                f"{place}: no field {name!r}; the fields are {', '.join(record) or 'none'}; set "
                "curate.fields"
            )
        parts += _texts(record[name], f"{place}: field {name!r}")
    return "\n\n".join(part for part in parts if part)


def _found_fields(record: dict[str, Any], place: str) -> list[str]:
    for required, others in SHAPES:
        if all(name in record for name in required):
            order = [required[0], *others, *required[1:]]
            return [name for name in order if name in record]
    raise InputError(
        f"{place}: no field that is known to hold text (text, messages, prompt and completion, ...)"
        f"; the fields are {', '.join(record) or 'none'}; name some in curate.fields"
    )


def _texts(value: Any, where: str) -> list[str]:
    """The strings of a field: a string, null, a list of these, or of messages."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        said = [value[name] for name in _CONTENT if value.get(name) is not None][:1]
        return [text for item in said for text in _texts(item, where)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item, where)]
    raise InputError(
        f"{where} is {type(value).__name__}, neither text nor messages; set curate.fields to the "
        "fields with the text"
    )


def all_strings(value: Any) -> Iterator[str]:
    """Every string in a record, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from all_strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from all_strings(inner)
