"""Stage drop: layers that the model does least with are taken out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schema import Config
from jobs.reporting import units
from jobs.reporting.dropping import chart_of, standing_alone
from jobs.runs.artifact import StageWriter
from jobs.runs.context import StageContext, fingerprints
from jobs.runs.models import Models
from jobs.runs.stage import Stage
from sparsify.errors import InputError


def identity(context: StageContext) -> dict[str, Any]:
    """What decides which layers go, and what is left."""
    config, models = context.config, context.models
    inputs = fingerprints({"model": models.to_drop, "dense": models.dense})
    settings: dict[str, Any] = context.settings("drop")
    if config.drop.reads_rows:
        data = context.settings("data")["data"]
        settings |= {
            "model.dtype": config.model.dtype,
            "data": {k: v for k, v in data.items() if k != "train"},
            "run.seed": config.run.seed,
        }
        inputs |= context.heldout_inputs()
        inputs["calibration"] = context.source_fingerprint("calibration")
    given = {} if models.to_drop == models.dense else context.given_masks(models.to_drop)
    return {"config": {**settings, **given}, "inputs": inputs}


def run(context: StageContext, writer: StageWriter) -> dict[str, Any]:
    """Choose on all workers, write what is left, check its zeros, draw why."""
    worker, models = _worker(), context.models
    payload = {
        "config": context.worker_config, "source": models.to_drop, "dense": models.dense,
        "folder": writer.folder / "model", "scratch": writer.scratch,
    }  # fmt: skip
    figures = context.cluster.run_workers(
        "drop", worker.drop_on_worker, payload, writer.train_storage
    )
    chart = chart_of(figures)
    if chart is not None:
        path = writer.folder / "chart.svg"
        path.write_text(standing_alone(chart), encoding="utf-8")
    return {
        "method": "dropped",
        **figures,
        "gate": {"dropped": worker.check_result(writer.folder / "model")},
    }


def check(config: Config, models: Models) -> None:
    """Require layers that can be dropped, so many of them, and a run of its own.

    Raises:
        InputError: see `DropConfig.num_dropped` and `workers.drop.check_drop`; or run.dir is the
            run that the model comes from, whose stages would then come after this one.
    """
    if config.run.from_ is not None and config.run.dir is not None:
        source, own = Path(config.run.from_).resolve(), Path(config.run.dir).resolve()
        if own in (source, *source.parents):
            raise InputError(
                f"run.dir={config.run.dir}: has stages already that come after drop, whose model "
                "they would seem to be made from; use another run.dir"
            )
    _worker().check_drop(config, models.to_drop)


def told(figures: dict[str, Any]) -> str:
    """What went, by which rule, and what it cost where that was measured."""
    gone, parts = figures["dropped_layers"], figures["dropped_sublayers"]
    names = [f"layer {layer}" for layer in gone] + [f"{p['part']} of {p['layer']}" for p in parts]
    why = "as named" if figures["rule"] == "layers" else figures["rule"]
    if rounds := figures.get("rounds"):
        why += f", KL {units.significant(rounds[-1]['kl'])} nats per token"
    return f"dropped {', '.join(names)} of {figures['num_layers_before']} layers ({why})"


def _worker() -> Any:
    from jobs.workers import drop  # costs torch

    return drop


STAGE = Stage(
    "drop", "the model without some of its layers", identity, run, check=check,
    makes=lambda _: {"dropped": "model"}, told=told,
    resumes="continues after the last choice that is on disk",
)  # fmt: skip
