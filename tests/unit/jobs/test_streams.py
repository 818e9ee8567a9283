"""What is printed comes out whole, in any encoding and at any width."""

from __future__ import annotations

import io
import sys

import pytest

from jobs.cli.streams import take_any_text
from jobs.reporting.summary import show

ROWS = [
    {
        "name": name, "label": name, "perplexity": 1185.0, "kl": 0.0445, "log_gap_recovered": None,
        "disk_bytes": 972_000, "packed_bytes": 769_000, "violations": 0,
    }
    for name in ("dense", "twofour")
]  # fmt: skip
SUMMARY = {
    "schema": 1, "run": {"pattern": "2:4"}, "layers": [], "pruning": [], "results": ROWS,
    "stages": [{"name": "prune", "status": "ran", "duration_s": 3.0}],
}  # fmt: skip


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch):
    """Standard output as a file of an encoding; its bytes."""

    def set_up(encoding: str) -> io.BytesIO:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        take_any_text()
        return raw

    return set_up


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("ascii", rb"K\xe9 - 3 x . \u4f60 \udce9"),
        ("latin-1", b"K\xe9 - 3 \xd7 . \\u4f60 \\udce9"),
        ("utf-8", "Ké – 3 × … 你 ".encode() + rb"\udce9"),
    ],
)  # fmt: skip
def test_text_that_an_encoding_lacks_is_written_as_near_as_it_can_be(out, encoding, said) -> None:
    raw = out(encoding)
    print("Ké – 3 × … 你 \udce9")  # the last one: a byte of a file name that is not UTF-8
    assert raw.getvalue().rstrip() == said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("columns", ["1", "20", "60", "200"])
def test_every_row_of_the_results_is_whole(out, monkeypatch, encoding, columns) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    raw = out(encoding)
    show(SUMMARY)
    lines = raw.getvalue().decode(encoding).splitlines()
    for name in ("dense", "twofour"):
        (row,) = [line for line in lines if line.strip().startswith(name)]
        assert {"1,185", "kB"} <= set(row.split())
    assert any({"prune", "ran"} <= set(line.split()) for line in lines)
