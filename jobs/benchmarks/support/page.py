"""Tables of a benchmark between two marks of a page, whose other text is people's."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from jobs.benchmarks.support.arguments import add_option
from sparsify.errors import InputError
from sparsify.files import written_whole


def add_page(parser: ArgumentParser, example: str, place: str = "tables") -> None:
    """--out and --place, for `write_page`."""
    page = (
        f"Markdown file for the tables, such as {example}; where it has the lines "
        "<!-- PLACE: begin --> and <!-- PLACE: end -->, only what is between them is replaced"
    )
    parser.add_argument("--out", type=Path, dest="markdown", metavar="FILE.md", help=page)
    add_option(parser, "--place", place, "place of the tables in that file")


def write_page(path: Path, tables: str, place: str, title: str) -> None:
    """Put the tables between the two marks of their place on a page; what is around them stays.

    Args:
        path: the page; made with a title and the marks where there is none.
        tables: in Markdown.
        place: name of the marks.
        title: of a page that is made.

    Raises:
        InputError: the file is there and has not both marks, in this order.
    """
    first, last = f"<!-- {place}: begin -->", f"<!-- {place}: end -->"
    page = f"# {title}\n\n{first}\n{last}\n"
    if path.is_file():
        page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise InputError(
            f"--out {path}: has no lines {first} and {last} to put the tables between; add them, "
            "or name another --place"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(f"{before}{first}\n\n{tables}\n\n{last}{after}", encoding="utf-8")
