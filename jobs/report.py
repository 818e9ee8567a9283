"""Report: one self-contained page with the run's figures and plots."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.ray_backend import WorkerContext
    from jobs._artifact import StageWriter
    from jobs._stage import StageContext


def identity(context: StageContext) -> dict[str, Any]:
    """The page shows the records of the other stages: they decide it."""
    from conf.schema import STAGES
    from jobs._artifact import RECORD
    from sparsify.files import file_sha256

    paths = {stage: context.run_dir / stage / RECORD for stage in STAGES if stage != "report"}
    inputs = {stage: file_sha256(path) for stage, path in paths.items() if path.is_file()}
    return {"config": {}, "inputs": inputs}


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Render the page and put it at the top of the run's folder as well."""
    from jobs._summary import build_summary

    summary = build_summary(context.run_dir, context)
    payload = {"summary": summary, "folder": writer.folder, "run_dir": context.run_dir}
    context.cluster.run_tasks("report", render_on_worker, [payload], "pages")
    return {}


def render_on_worker(context: WorkerContext, payload: dict[str, Any]) -> None:
    """One task: write report.html."""
    from jobs._html import render_report

    page = render_report(payload["summary"])
    (payload["folder"] / "report.html").write_text(page, encoding="utf-8")
    temporary = payload["run_dir"] / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(payload["run_dir"] / "report.html")


if __name__ == "__main__":
    hint = "python -m jobs.prune 'stages=[report]' run.from=RUN run.dir=RUN"
    print(f"error: report is a stage of the pipeline; run {hint}", file=sys.stderr)
    sys.exit(2)
