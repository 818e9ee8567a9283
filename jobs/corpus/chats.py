"""Records of conversations: read from wherever text is read from, recognised by their fields.

The forms are those of `turns`. A source has records of one of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.corpus.builtin import BUILT_IN
from jobs.corpus.documents import Remarks
from jobs.corpus.places import (
    HUB,
    TEXT_SUFFIXES,
    existing_path,
    full_name,
    kind_of,
    source_files,
)
from jobs.corpus.raw_records import records_of
from jobs.corpus.text_files import is_dataset
from jobs.corpus.turns import Turn, form_of, forms_said, has_answer, turns_of
from sparsify.data.store import is_store
from sparsify.errors import InputError

TEXT = "text"
"""the form of records that are documents, learned whole"""

_NAMES = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output")
"""what `fields` may name"""

NO_ANSWER = "records without an answer, left out"


@dataclass
class Chats:
    """A source of conversations.

    Args:
        name: as in `data.train`.
        fields: `NAME:COLUMN`, columns under the names that a form gives them.
        text_field: the column of documents.
    """

    name: str
    fields: Sequence[str] = ()
    text_field: str = "text"
    remarks: Remarks = field(default_factory=Remarks)
    """what was left out, after a pass"""

    def form(self) -> str:
        """The form of the source, by its first record.

        Raises:
            InputError: it cannot be read, or its fields are none of a form.
        """
        names = set(BUILT_IN)
        path = Path(self.name).expanduser()
        if self.name in names or is_store(path):
            return TEXT
        full = full_name(self.name, BUILT_IN)
        if not full.startswith(HUB) and not is_dataset(full):
            files = source_files(existing_path(full, BUILT_IN))
            if kind_of(files[0])[0] in TEXT_SUFFIXES:
                return TEXT
        for place, record in records_of(self.name):
            return self._form_of(record, place)
        raise InputError(f"data source {self.name}: no records in it; give a source that has some")

    def __iter__(self) -> Iterator[tuple[str, list[Turn]]]:
        """(place, turns) of every record with an answer.

        Raises:
            InputError: a record of another form than the first, or that is not what its form says;
                or not one record with an answer.
        """
        self.remarks = Remarks()
        form, count = None, 0
        for place, record in records_of(self.name):
            own = self._form_of(record, place)
            form = form or own
            if own == form == TEXT:
                raise InputError(f"{place}: {_said(TEXT)}, and conversations are wanted here")
            if own != form:
                raise InputError(
                    f"{place}: {_said(own)}, and the records before it {_said(form)}; give records "
                    "of one form, a source for each"
                )
            turns = turns_of(self._renamed(record, place), form, place)
            if not has_answer(turns):
                self.remarks.add(NO_ANSWER, place.rpartition("/")[2])
                continue
            count += 1
            yield place, turns
        if not count:
            raise InputError(
                f"data source {self.name}: not one record with an answer in it; give records whose "
                "last turn is the assistant's"
            )

    def digest(self) -> tuple[str, int]:
        """SHA-256 (hex) of the conversations in their order, and how many there are."""
        digest, count = hashlib.sha256(), 0
        for _, turns in self:
            count += 1
            digest.update(json.dumps(turns, sort_keys=True).encode())
        return digest.hexdigest(), count

    def _form_of(self, record: dict[str, Any], place: str) -> str:
        if (form := form_of(self._renamed(record, place))) is not None:
            return form
        if self.text_field in record and not self.fields:
            return TEXT
        raise InputError(
            f"{place}: the fields {', '.join(record) or '(none)'} are of no known form; expected "
            f"{forms_said()}; or {self.text_field}; name yours with "
            "finetune.fields=[prompt:COLUMN,completion:COLUMN]"
        )

    def _renamed(self, record: dict[str, Any], place: str) -> dict[str, Any]:
        """The record under the names that `fields` give its columns."""
        if not self.fields:
            return record
        found = {}
        for entry in self.fields:
            name, _, column = entry.partition(":")
            if column not in record:
                raise InputError(
                    f"{place}: no field {column!r}, which finetune.fields names; the fields are "
                    f"{', '.join(record) or 'none'}"
                )
            found[name] = record[column]
        return found


def check_fields(fields: Sequence[str]) -> None:
    """Require NAME:COLUMN with names that forms have; InputError else."""
    for entry in fields:
        name, _, column = entry.partition(":")
        if name not in _NAMES or not column:
            raise InputError(
                f"finetune.fields: {entry!r} is not NAME:COLUMN with a name of "
                f"{', '.join(_NAMES)}; write it like [prompt:question,completion:answer]"
            )


def _said(form: str) -> str:
    return "is a document of text" if form == TEXT else f"has the fields of {form}"
