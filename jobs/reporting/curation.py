"""What was made of a corpus, for people: a table, and a page with examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from jobs.reporting import units
from jobs.reporting.bars import Bar, BarChart, Span
from jobs.reporting.page import render_curation
from jobs.reporting.tables import new_table, print_tables
from jobs.runs.folder import read_json, write_text

REASONS = {
    "empty": "no text",
    "copies.exact": "same text as an earlier one",
    "copies.near": "nearly the text of an earlier one",
    "mixing": "more than the share of its source",
}
"""reason -> words, of those that are no filter's"""


def report(folder: Path, command: str) -> None:
    """Print the tables of a curated corpus, and write its page `report.html`.

    Args:
        folder: with `curation.json`.
        command: that made it.
    """
    record = read_json(folder / "curation.json", f"remove {folder} to start over")
    print_tables(lambda width: curation_tables(record))
    write_text(folder / "report.html", render_curation(page_values(record), command))


def curation_tables(record: dict[str, Any]) -> list[Table]:
    """One row for each source, and one for each reason."""
    table = new_table("Source", "Documents", "Dropped", "Taken", "Share")
    total = record["result"]["documents"]
    for one in record["sources"]:
        table.add_row(Text(one["name"]), *_source_cells(one, total))
    reasons = new_table("Dropped because", "Documents", "Characters")
    for one in record["reasons"]:
        cells = units.count(one["documents"]), units.large_count(one["characters"])
        reasons.add_row(Text(one["reason"]), *cells)
    return [table, reasons] if record["reasons"] else [table]


def _source_cells(one: dict[str, Any], total: int) -> list[str]:
    dropped = sum(one["dropped"].values())
    again = f" (up to {one['most_repeats']}×)" if one["most_repeats"] > 1 else ""
    return [
        units.count(one["documents"]), units.count(dropped),
        f"{units.count(one['documents_taken'])}{again}",
        units.percent(one["documents_taken"] / total if total else None),
    ]  # fmt: skip


def page_values(record: dict[str, Any]) -> dict[str, Any]:
    """What the page shows, by the names that its template has."""
    given = sum(one["documents"] for one in record["sources"])
    result = record["result"]
    dropped = sum(one["documents"] for one in record["reasons"])
    sources = [
        (one["name"], _source_cells(one, result["documents"]), "") for one in record["sources"]
    ]
    options = record["settings"]
    facts = [
        (name.replace("_", " "), str(value))
        for group in ("judging", "choosing")
        for name, value in options[group].items()
        if name not in ("sources", "against") and value not in (None, [], "")
    ]
    return {
        "words": [
            (f"{units.count(result['documents'])} of {units.count(given)} documents", "gain"),
            (" are kept", ""),
        ],
        "lead": f"{units.large_count(result['characters'])} characters, "
        f"{units.large_count(result['words'])} words; {units.count(dropped)} documents dropped.",
        "byline": [one["name"] for one in record["sources"]],
        "alerts": record["warnings"],
        "sources": sources,
        "reasons": _reason_chart(record["reasons"], given),
        "examples": [
            {**one, "words": REASONS.get(one["reason"], "")}
            for one in record["reasons"]
            if one["examples"]
        ],
        "pairs": [
            {**pair, "words": REASONS[pair["reason"]], "share": f"{pair['similarity']:.2f}"}
            for pair in record["pairs"]
        ],
        "facts": facts,
    }


def _reason_chart(reasons: list[dict[str, Any]], given: int) -> BarChart | None:
    """A bar for each reason, against the most frequent one."""
    if not reasons:
        return None
    most = max(one["documents"] for one in reasons)
    rows = []
    for one in reasons:
        value, share = units.count(one["documents"]), units.percent(one["documents"] / given)
        words = REASONS.get(one["reason"], "")
        title = f"{one['reason']}: {value} documents, {share}" + (words and f": {words}")
        spans = [Span("time", 0.0, one["documents"] / most)]
        rows.append(Bar(one["reason"], value, share, title, [spans]))
    return BarChart(rows)
