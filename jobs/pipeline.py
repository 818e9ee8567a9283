"""The pipeline: which stages there are, what they make, and running them one after another.

    dense model --prune--> one-shot models --distill--> recovered --quantize--> INT4
         |                      |                           |                     |
         +---------evaluate-----+---------------------------+                  (scored)
                                 export: folders to load and serve; report: the page to look at

A finished stage is reused when the same command comes again; see jobs/_artifact.py.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.schema import Config, default_run_dir, to_dict
from jobs import _artifact, _stage
from sparsify import errors
from sparsify.errors import InputError, TwofourError

if TYPE_CHECKING:
    from cluster.ray_backend import RayCluster
    from jobs._artifact import Artifact
    from jobs._progress import Display

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """What the pipeline knows of a stage; the work is in jobs/<name>.py."""

    name: str
    makes: str
    may_extend: bool = False
    """more inputs than last time are a reason to run again, not a conflict"""
    is_derived: bool = False
    """only shows other stages, so that whatever changed in them is a reason to run again"""


PIPELINE = (
    Stage("prune", "one-shot pruned models, one per method"),
    Stage("distill", "the recovered model"),
    Stage("evaluate", "perplexity of every model so far", may_extend=True),
    Stage("quantize", "the INT4 model, packed and scored"),
    Stage("export", "folders to load, serve and share"),
    Stage("report", "report.html", is_derived=True),
)


def run_pipeline(config: Config, job: str) -> Path:
    """Run the config's stages in order, reusing those that are finished.

    Args:
        config: checked by its own rules.
        job: the command's module name, for the record.

    Returns:
        The run's folder.

    Raises:
        InputError: something the user can put right.
        TwofourError: a stage could not be finished; finished ones are kept.
    """
    from jobs._progress import Display
    from jobs._sources import with_absolute_paths
    from jobs._tracking import open_tracker

    run_dir = Path(config.run.dir or default_run_dir(config)).absolute()
    _artifact.prepare_run_dir(run_dir)
    command = shlex.join(["python", "-m", f"jobs.{job}", *sys.argv[1:]])
    with contextlib.ExitStack() as stack:
        stack.enter_context(_artifact.run_lock(run_dir))
        display = stack.enter_context(Display())
        display.say(f"run {run_dir}: {' -> '.join(config.stages)} on {config.cluster.name}")
        models = _stage.find_models(config, run_dir)
        _check_inputs(config, models)
        tracker = open_tracker(
            config.tracker, run_dir, run_dir.name, to_dict(config), warn=display.say
        )
        stack.callback(tracker.close)
        clusters = _Clusters(config, run_dir.name, display, tracker, stack)
        context = _stage.StageContext(
            config,
            replace(config, data=with_absolute_paths(config.data)),
            run_dir,
            command,
            models,
            display,
            tracker,
            clusters.open,
            clusters.warnings,
        )
        journal = _RedoJournal(run_dir, command)
        stages = [stage for stage in PIPELINE if stage.name in config.stages]
        for stage in stages:
            artifact = _run_stage(stage, context, journal)
            was_redone = stage.name in journal.done
            is_new = was_redone or not artifact.is_reused
            context.statuses[stage.name] = "ran" if is_new else "reused"
            if not artifact.is_reused:
                _stage.forget_descendants(context.models, stage.name)
            _stage.add_finished(context.models, stage.name, artifact.folder)
            tracker.log({f"{stage.name}/duration_s": artifact.record["duration_s"]})
        journal.close()
    from jobs._summary import show, write_summary

    show(write_summary(run_dir, context))
    return run_dir


class _Clusters:
    """Starts the run's Ray when the first stage needs it; a run that reuses all needs none."""

    def __init__(
        self, config: Config, run_name: str, display: Display, tracker: Any,
        stack: contextlib.ExitStack,
    ) -> None:  # fmt: skip
        self.warnings: list[str] = []
        self._config = config
        self._run_name = run_name
        self._display = display
        self._tracker = tracker
        self._stack = stack
        self._cluster: RayCluster | None = None

    def open(self) -> RayCluster:
        if self._cluster is None:
            from cluster.ray_backend import RayCluster

            cluster = RayCluster(self._config.cluster, self._run_name, ROOT, self._on_event)
            with cluster_errors():
                self._cluster = self._stack.enter_context(cluster)
            if self._cluster.dashboard_url:
                url = self._cluster.dashboard_url
                self._display.say(f"Ray dashboard: {url} (its token: ray get-auth-token)")
        return self._cluster

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "metrics":
            self._tracker.log(event["values"], event["step"])
            return
        if event["kind"] == "warning":
            self.warnings.append(event["text"])
        self._display.on_event(event)


def _run_stage(stage: Stage, context: _stage.StageContext, journal: _RedoJournal) -> Artifact:
    """Reuse the stage's finished result, or make it."""
    module = importlib.import_module(f"jobs.{stage.name}")
    is_asked = any(name in ("all", stage.name) for name in context.config.run.redo)
    redo = is_asked and stage.name not in journal.done
    may_follow = stage.is_derived or "ran" in context.statuses.values()
    identity = module.identity(context)
    if not redo:
        finished = _artifact.find_finished(
            context.run_dir, stage.name, identity, stage.may_extend, may_follow
        )
        if finished is not None:
            context.display.finish_stage(stage.name, "reused")
            return finished
    context.display.start_stage(stage.name)
    writer = _artifact.StageWriter(
        context.run_dir,
        stage.name,
        identity,
        context.command,
        redo,
        may_follow or stage.may_extend,
    )
    with cluster_errors(), _artifact.disk_errors(writer.folder):
        metrics = module.run(context, writer)
    metrics["warnings"] = list(context.warnings)
    context.warnings.clear()
    artifact = writer.commit(metrics, context.config.run.seed)
    if is_asked:
        journal.add(stage.name)
    context.display.finish_stage(stage.name, stage.makes)
    return artifact


class _RedoJournal:
    """Stages that an interrupted command with run.redo has already made again.

    The same command then goes on with the next one instead of starting over.
    """

    def __init__(self, run_dir: Path, command: str) -> None:
        self._path = run_dir / ".redo.json"
        self._command = command
        self.done: list[str] = []
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            before = json.loads(self._path.read_text(encoding="utf-8"))
            self.done = before["done"] if before["command"] == command else []

    def add(self, stage: str) -> None:
        """Note that a stage has been made again."""
        self.done.append(stage)
        _artifact.write_json(self._path, {"command": self._command, "done": self.done})

    def close(self) -> None:
        """The command is done: the next redo starts afresh."""
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def cluster_errors() -> Iterator[None]:
    """Bring an error of the cluster or of a worker back as one of ours."""
    from cluster.errors import ClusterError, WorkFailedError

    try:
        yield
    except ClusterError as error:
        raise InputError(str(error)) from None
    except WorkFailedError as error:
        kind = getattr(errors, error.kind, None)
        if isinstance(kind, type) and issubclass(kind, TwofourError):
            raise kind(error.message) from None
        print(error.traceback, file=sys.stderr)
        raise TwofourError(f"{error.kind} on a worker: {error.message}") from None


def _check_inputs(config: Config, models: _stage.Models) -> None:
    """Find what is wrong with the user's model, text and options before anything is started."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from jobs._sources import source_fingerprint
    from jobs._teacher_cache import check_cache
    from sparsify.layers import prunable_linears
    from sparsify.models.load import (
        check_checkpoint,
        check_sequence_length,
        check_vocabulary,
        load_tokenizer,
    )
    from sparsify.pattern import Pattern, check_divides

    for folder in [models.dense, *models.pruned.values()]:
        check_checkpoint(folder)
    tokenizer = load_tokenizer(models.dense)
    model_config = AutoConfig.from_pretrained(models.dense, local_files_only=True)
    check_sequence_length(model_config, config.data.sequence_length)
    with torch.device("meta"):  # shapes without weights
        model = AutoModelForCausalLM.from_config(model_config)
    check_vocabulary(model, tokenizer, str(models.dense))
    source_fingerprint(config.data, "calibration")
    if "distill" in config.stages:
        check_cache(config, models.dense)
    if "prune" in config.stages:
        pattern = Pattern.parse(config.prune.pattern)
        for _, name, module in prunable_linears(model, config.prune.skip):
            check_divides(name, module.in_features, pattern)


def describe_plan(config: Config) -> list[str]:
    """What a run of this config would do, in lines for a person; touches nothing."""
    run_dir = Path(config.run.dir or default_run_dir(config))
    spec = config.cluster
    device = "GPU" if spec.uses_gpu else "CPU"
    lines = [
        f"run folder: {run_dir}",
        f"model: {config.run.from_ or config.model.path}",
        f"cluster: {spec.name}, {spec.num_workers} {device} workers on {spec.num_nodes} node(s)",
        f"  {spec.description}",
        "stages:",
    ]
    for stage in PIPELINE:
        if stage.name in config.stages:
            state = "finished" if (run_dir / stage.name).is_dir() else "to run"
            lines.append(f"  {stage.name:<9} {state:<9} {stage.makes}")
    return lines
