"""Documents as a sequence that is read when it is asked for, and what was noticed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

EMPTY = "rows without text (null or empty), passed over"
HALVES = "rows with half of a surrogate pair, read as U+FFFD"
DECODED = "files decoded from UTF-16 or UTF-32, as their byte order marks say"
LONG = "documents of 32 MiB or more, read in pieces of 16 MiB, each a document of its own"
LEFT_OUT = "files left out"

_SHOWN = 3


class Remarks:
    """What a source leaves out or replaces: how often, and the first places."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}

    def add(self, what: str, place: str) -> None:
        """Note one more."""
        self._merge(what, 1, [place])

    def update(self, other: Remarks) -> None:
        """Note all that another part of the source has."""
        for what, (count, places) in other._found.items():
            self._merge(what, count, places)

    def _merge(self, what: str, count: int, places: Iterable[str]) -> None:
        before, shown = self._found.get(what, (0, []))
        self._found[what] = before + count, [*shown, *places][:_SHOWN]

    def lines(self) -> list[str]:
        """One line for each kind."""
        return [
            f"{what}: {count:,} ({', '.join(places)}{', ...' if count > len(places) else ''})"
            for what, (count, places) in self._found.items()
        ]


class Documents(Sequence[str]):
    """A sequence of texts of which each is made when it is asked for.

    Args:
        items: one for each text.
        read: makes the text of an item.
        remarks: what is left out of the sequence, or replaced in it.
    """

    def __init__(
        self,
        items: Sequence[Any],
        read: Callable[[Any], Any] = str,
        remarks: Remarks | None = None,
    ) -> None:
        self._items = items
        self._read = read
        self.remarks = remarks or Remarks()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._read(self._items[index])


def joined(sources: Sequence[Sequence[str]]) -> Documents:
    """The documents of several sources as one sequence, and their remarks."""
    remarks = Remarks()
    for source in sources:
        if isinstance(source, Documents):
            remarks.update(source.remarks)
    places = [(source, i) for source in sources for i in range(len(source))]
    return Documents(places, lambda place: place[0][place[1]], remarks)
