"""Stage report: one page of the whole run, made from its records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.runs.stage import Stage

if TYPE_CHECKING:
    from cluster.runtime.backend import WorkerContext
    from jobs.runs.artifact import StageWriter
    from jobs.runs.context import StageContext


def identity(context: StageContext) -> dict[str, Any]:
    """The page shows the records of the other stages: they decide it."""
    from conf.options.run import STAGES
    from jobs.runs.artifact import RECORD
    from sparsify.files import file_sha256

    paths = {stage: context.run_dir / stage / RECORD for stage in STAGES if stage != "report"}
    inputs = {stage: file_sha256(path) for stage, path in paths.items() if path.is_file()}
    return {"config": {}, "inputs": inputs}


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Render the page and put it at the top of the run's folder as well."""
    from jobs.reporting.summary import build_summary

    summary = build_summary(context.run_dir, context)
    payload = {"summary": summary, "folder": writer.folder, "run_dir": context.run_dir}
    context.cluster.run_tasks("report", render_on_worker, [payload], "pages")
    return {}


def render_on_worker(context: WorkerContext, payload: dict[str, Any]) -> None:
    """One task: write report.html."""
    from jobs.reporting.page import render_report

    page = render_report(payload["summary"])
    (payload["folder"] / "report.html").write_text(page, encoding="utf-8")
    temporary = payload["run_dir"] / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(payload["run_dir"] / "report.html")


STAGE = Stage("report", "report.html", identity, run, is_derived=True)
