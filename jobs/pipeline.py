"""The pipeline: which stages there are, what they make, and running them one after another.

    dense model --prune--> one-shot models --distill--> recovered --quantize--> INT4
         |                      |                           |                     |
         +---------evaluate-----+---------------------------+                  (scored)
                                 export: folders to load and serve; report: the page to look at

A finished stage is reused when the same command comes again; see jobs/runs/artifact.py.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from conf.options.run import STAGES
from conf.schema import Config, default_run_dir, to_dict
from jobs import stages
from jobs.cli.command import Command
from jobs.cli.submit import remember_here
from jobs.reporting.summary import show, write_summary
from jobs.runs.artifact import Artifact, StageWriter, find_finished
from jobs.runs.context import StageContext
from jobs.runs.folder import disk_errors, prepare_run_dir, run_lock
from jobs.runs.models import find_models
from jobs.runs.redo import RedoJournal
from jobs.runs.session import Clusters, cluster_errors
from jobs.runs.stage import Stage
from jobs.runs.tracking import open_tracker

PIPELINE: tuple[Stage, ...] = tuple(stages.stage(name) for name in STAGES)


def command(name: str, summary: str, uses: str, *examples: str) -> Command:
    """The command that runs this pipeline, or one stage of it, as conf/<name>.yaml says.

    Args:
        name: of the command's module.
        summary: its docstring.
        uses: the groups and options that it takes, with spaces between; '' takes all.
        examples: words of command lines that people may want to copy.
    """
    return Command(
        name, Config, lambda config: run_pipeline(config, name), lambda c: describe_plan(c),
        summary, examples, tuple(uses.split()), needs="run.from=PATH" if uses else "",
    )  # fmt: skip


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
    from jobs.corpus.sources import with_absolute_paths  # these three cost torch or rich
    from jobs.runs.display import Display
    from jobs.workers.checks import check_inputs

    run_dir = Path(config.run.dir or default_run_dir(config)).absolute()
    prepare_run_dir(run_dir)
    command = shlex.join(["python", "-m", f"jobs.{job}", *sys.argv[1:]])
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_lock(run_dir))
        display = stack.enter_context(Display())
        if unknown := remember_here(run_dir, job, command):
            display.say(unknown)
        display.say(f"run {run_dir}: {' -> '.join(config.stages)} on {config.cluster.name}")
        models = find_models(config, run_dir, PIPELINE)
        check_inputs(config.data, models)
        asked = [stage for stage in PIPELINE if stage.name in config.stages]
        for stage in asked:
            if stage.check is not None:
                stage.check(config, models)
        tracker = open_tracker(
            config.tracker, run_dir, run_dir.name, to_dict(config), warn=display.say
        )
        stack.callback(tracker.close)
        clusters = Clusters(config.cluster, run_dir.name, display, tracker, stack)
        context = StageContext(
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
        journal = RedoJournal(run_dir, command)
        for stage in asked:
            artifact = _run_stage(stage, context, journal)
            was_redone = stage.name in journal.done
            is_new = was_redone or not artifact.is_reused
            context.statuses[stage.name] = "ran" if is_new else "reused"
            if not artifact.is_reused:
                models.forget_descendants(stage.name)
            models.add(stage.name, artifact.folder)
            tracker.log({f"{stage.name}/duration_s": artifact.record["duration_s"]})
        journal.close()
    show(write_summary(run_dir, context))
    return run_dir


def _run_stage(stage: Stage, context: StageContext, journal: RedoJournal) -> Artifact:
    """Reuse the stage's finished result, or make it."""
    is_asked = any(name in ("all", stage.name) for name in context.config.run.redo)
    redo = is_asked and stage.name not in journal.done
    may_follow = stage.is_derived or "ran" in context.statuses.values()
    identity = stage.identity(context)
    if not redo:
        finished = find_finished(
            context.run_dir, stage.name, identity, stage.may_extend, may_follow
        )
        if finished is not None:
            context.display.finish_stage(stage.name, "reused")
            return finished
    context.display.start_stage(stage.name)
    writer = StageWriter(
        context.run_dir,
        stage.name,
        identity,
        context.command,
        redo,
        may_follow or stage.may_extend,
    )
    with cluster_errors(), disk_errors(writer.folder):
        metrics = stage.run(context, writer)
    metrics["warnings"] = list(context.warnings)
    context.warnings.clear()
    artifact = writer.commit(metrics, context.config.run.seed)
    if is_asked:
        journal.add(stage.name)
    context.display.finish_stage(stage.name, stage.result)
    return artifact


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
            lines.append(f"  {stage.name:<9} {state:<9} {stage.result}")
    return lines
