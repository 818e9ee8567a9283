"""Stage report: one page of the whole run, made from its records."""

from __future__ import annotations

from typing import Any

from conf.options.run import STAGES
from jobs.reporting.summary import build_summary
from jobs.runs.artifact import RECORD, StageWriter
from jobs.runs.context import StageContext
from jobs.runs.folder import write_text
from jobs.runs.stage import Stage
from sparsify.files import file_sha256

_PAGE = "report.html"


def identity(context: StageContext) -> dict[str, Any]:
    """The page shows the records of the other stages: they decide it."""
    paths = {stage: context.run_dir / stage / RECORD for stage in STAGES if stage != "report"}
    inputs = {stage: file_sha256(path) for stage, path in paths.items() if path.is_file()}
    return {"config": {}, "inputs": inputs}


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Render the page and put it at the top of the run's folder as well."""
    from jobs.reporting.page import render_report  # costs the drawing of charts

    page = render_report(build_summary(context.run_dir, context))
    for folder in (writer.folder, context.run_dir):
        write_text(folder / _PAGE, page)
    return {}


STAGE = Stage("report", _PAGE, identity, run, is_derived=True)
