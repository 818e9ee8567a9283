"""The figures of `make demo` as the README shows them, from the run that it left.

Nothing is measured here: the run's summary.json becomes the record, without its list of layers, and
the part of the README between the marks is written anew from it.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from jobs.benchmarks.support.arguments import settings_of
from jobs.benchmarks.support.commands import markdown_table, summary_of
from jobs.benchmarks.support.record import Outcome, Table
from jobs.reporting import units
from jobs.reporting.deployed import generation_rows, layer_rows, where_of, writing_of
from jobs.reporting.results import find_result
from sparsify.errors import InputError
from sparsify.files import written_whole

SUMMARY = "what `make demo` measured, as a record, and the README's part made from it"

EXAMPLES = ("demo --output README.md --save",)

BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"

_BUSY = ", beside much other work: all times here are too long"

_MOST_CHARACTERS = 84  # of a text in the table

_NOTES = (
    "the summary.json of the run, without the list of all layers; times are the run's",
    "tokens/s: transformers at batch 1 after 16 tokens, medians of three rounds in turns",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    run = "folder of the finished run (default: %(default)s)"
    default = Path("runs/embedded-2-4-twofour")
    parser.add_argument("--run", type=Path, dest="folder", default=default, help=run)
    busy = "the machine did other work meanwhile: the page says so beside the times"
    parser.add_argument("--busy", action="store_true", help=busy)
    page = f"Markdown file with the marks '{BEGIN}' and '{END}', such as README.md"
    parser.add_argument("--output", type=Path, dest="markdown", metavar="FILE.md", help=page)


def run(options: Namespace) -> Outcome:
    """Read the run, and write the part of the page.

    Raises:
        InputError: no finished run is there, or the page has no marks.
    """
    try:
        summary = summary_of(options.folder)
    except OSError as error:
        raise InputError(
            f"--run {options.folder}: no summary.json ({error.strerror}); run 'make demo' first"
        ) from None
    figures = {key: value for key, value in summary.items() if key != "layers"}
    figures["run"] = {**figures["run"], "dir": str(options.folder)}
    figures["was_busy"] = options.busy
    if figures.get("recovery"):
        figures["recovery"] = {**figures["recovery"], "steps": len(figures["recovery"]["steps"])}
    if figures.get("quantization"):
        figures["quantization"] = {**figures["quantization"], "layers": None}
    if options.markdown is not None:
        put_between(options.markdown, markdown(figures))
    tables = [_results(figures), *filter(None, [_speed(figures), _texts(figures)])]
    threads = (figures.get("speed") or {}).get("num_threads", 1)
    return Outcome(
        figures["run"]["device"], threads, settings_of(options, "busy"), figures, tables,
        notes=list(_NOTES),
    )  # fmt: skip


def put_between(path: Path, text: str) -> None:
    """Put the text between the marks of a page, in place of what is there.

    Raises:
        InputError: the page cannot be read, or has no marks.
    """
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {path}: cannot be read ({error.strerror})") from None
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"--output {path}: has no '{BEGIN}' with '{END}' after it")
    with written_whole(path) as temporary:
        temporary.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def markdown(figures: dict[str, Any]) -> str:
    """The part of the README: quality and sizes, what is faster, and what the models write."""
    run = figures["run"]
    busy = _BUSY if figures.get("was_busy") else ""
    said = [
        f"`make demo` made this in {run['duration_s']:.0f} s with {run['num_workers']} processes "
        f"({run['device'].upper()}){busy}. Size: of the packed form; of this tiny model's dense "
        "file a good part are embeddings.",
        *_faster(figures.get("speed")),
    ]
    parts = [markdown_table(_results(figures)).strip()]
    if (texts := _texts(figures)) is not None:
        written = writing_of(figures) or {}
        said.append(f"What the models write, {written['manner']}. {written['remark']}".strip())
        parts += [" ".join(said), markdown_table(texts).strip()]
    else:
        parts.append(" ".join(said))
    return "\n\n".join(parts) + "\n"


def _faster(speed: dict[str, Any] | None) -> list[str]:
    """One sentence on the model's own speed and on a large layer's; none where it was not timed."""
    if not speed or not speed.get("layer"):
        return []
    rates = [
        f"{row['name']} {units.significant(row['tokens_per_s'])}" for row in generation_rows(speed)
    ]
    layer = speed["layer"]
    times = [
        f"{row['name']} {units.ratio(row['times_dense'])}"
        for row in layer_rows(layer)
        if not row["name"].startswith("dense")
    ]
    return [
        f"Faster: not this model, whose layers take longer to call than to read "
        f"({', '.join(rates)} tokens/s), but a layer of {layer['rows']} × {layer['columns']} as "
        f"large models have, on the same machine ({where_of(speed)}): {', '.join(times)} of the "
        "faster dense type."
    ]


def _results(figures: dict[str, Any]) -> Table:
    """Quality and size of each model."""
    dense = find_result(figures["results"], "dense") or {}
    rows = []
    for row in figures["results"]:
        packed = row.get("packed_bytes")
        factor = units.ratio(dense["disk_bytes"] / packed) if packed else units.MISSING
        rows.append((
            row["label"], units.perplexity(row["perplexity"]),
            units.percent(row["log_gap_recovered"]), units.significant(row["kl"]),
            units.size(packed or row["disk_bytes"]), factor,
        ))  # fmt: skip
    headings = ("model", "perplexity", "gap recovered", "KL (nats)", "size", "smaller")
    return Table(headings, rows)


def _speed(figures: dict[str, Any]) -> Table | None:
    """One large layer, side by side."""
    layer = (figures.get("speed") or {}).get("layer")
    if not layer:
        return None
    rows = layer_rows(layer)
    return Table(
        ("one layer", *(row["name"] for row in rows)),
        [
            ("weights", *(units.size(row["num_bytes"]) for row in rows)),
            ("a token", *(units.milliseconds(row["median_s"]) for row in rows)),
            ("times the faster dense", *(units.ratio(row["times_dense"]) for row in rows)),
        ],
    )


def _texts(figures: dict[str, Any]) -> Table | None:
    """What each model writes, on one line each."""
    written = writing_of(figures)
    if written is None:
        return None
    prompt = written["texts"][0]["prompt"]
    rows = [(one["label"], _one_line(one["text"])) for one in written["texts"]]
    return Table(("model", f"goes on after {_one_line(prompt)}"), rows)


def _one_line(text: str) -> str:
    """A text as code in a cell: line ends are shown as a sign, long ones are cut."""
    line = re.sub(r" *\n\s*", " ⏎ ", text.strip("\n")).replace("`", "'").replace("|", "¦")
    shown = line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS].rstrip()} …"
    return f"`` {shown} ``"
