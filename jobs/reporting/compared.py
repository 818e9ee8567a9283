"""A comparison of runs for people and scripts: the table, the page, compare.json, compare.csv."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from jobs.reporting.comparison import FIGURES, compare_folder
from jobs.reporting.page import render_comparison
from jobs.reporting.tables import print_tables, runs_table
from jobs.runs.folder import write_json, write_text
from sparsify.errors import InputError


def compare(folder: Path) -> None:
    """Print the table of a folder's runs, and write page, JSON and CSV into the folder.

    Raises:
        InputError: there is no run in it.
    """
    comparison = compare_folder(folder)
    print_tables(lambda width: [runs_table(comparison, width)])
    unfinished = [run for run in comparison["runs"] if run["detail"] and run["state"] != "done"]
    for run in unfinished:
        print(f"{run['run']}: {run['state']}: {run['detail']}")
    try:
        write_json(folder / "compare.json", comparison)
        write_text(folder / "compare.csv", _csv(comparison))
        write_text(folder / "compare.html", render_comparison(comparison))
    except InputError as error:  # somebody else's sweep: the table is all that there is to see
        print(f"nothing is written: {error}")
        return
    print(f"{folder / 'compare.html'}, and compare.json and compare.csv beside it")


def _csv(comparison: dict[str, Any]) -> str:
    """A row for each run: where it is, the words that differ, what it has measured."""
    out = io.StringIO()
    keys = comparison["differs"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "state", "detail", "exit_code", *keys, *FIGURES])
    for run in comparison["runs"]:
        words = run["words"] or {}
        known = [run[name] for name in ("run", "state", "detail", "exit_code")]
        writer.writerow([*known, *(words.get(key) for key in keys), *(run[n] for n in FIGURES)])
    return out.getvalue()
