"""The pipeline: which stages there are, what they make, and running them one after another.

    dense model --prune--> one-shot models --distill--> recovered --quantize--> INT4
    (drop, where it is asked for, comes first: a dense or recovered model loses layers;
     pretrain, a run by itself, makes the dense model)
         |                      |                           |                     |
         +---------evaluate-----+---------------------------+                  (scored)
                                 finetune, where it is asked for: what was recovered learns a task
                                 export: folders to load and serve; report: the page to look at

A finished stage is reused when the same command comes again; see jobs/runs/artifact.py.
"""

from __future__ import annotations

import contextlib
import gc
import shlex
import sys
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from cluster.machine import require_answer
from cluster.preempt import end_if_asked, telling
from cluster.spec import ClusterSpec
from conf.options.run import STAGES
from conf.schema import Config, default_run_dir, to_dict
from jobs import stages
from jobs.cli.command import Command
from jobs.cli.submit import remembered_here
from jobs.reporting.summary import show, write_summary
from jobs.runs.artifact import Artifact, StageWriter, find_finished
from jobs.runs.context import StageContext
from jobs.runs.folder import disk_errors, prepare_run_dir, run_lock
from jobs.runs.hub import bytes_to_download
from jobs.runs.models import Models, find_models
from jobs.runs.preflight import SKIPPING, is_due
from jobs.runs.recipes import write_recipes
from jobs.runs.redo import RedoJournal
from jobs.runs.session import Clusters, cluster_errors
from jobs.runs.stage import Stage
from jobs.runs.tracking import open_tracker

PIPELINE: tuple[Stage, ...] = tuple(stages.stage(name) for name in STAGES)


def command(
    name: str, summary: str, uses: str, *examples: str, needs: str = "run.from=PATH"
) -> Command:  # fmt: skip
    """The command that runs this pipeline, or one stage of it, as conf/<name>.yaml says.

    Args:
        name: of the command's module.
        summary: its docstring.
        uses: the groups and options that it takes, with spaces between; '' takes all.
        examples: words of command lines that people may want to copy.
        needs: an option that it does not run without, if it is of one stage.
    """
    return Command(
        name, Config, lambda config: run_pipeline(config, name), lambda c: describe_plan(c),
        summary, examples, tuple(uses.split()), needs=needs if uses else "",
        compare=_compare,
    )  # fmt: skip


def _compare(folder: Path) -> None:
    from jobs.reporting.compared import compare  # costs rich and the drawing of charts

    compare(folder)


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
    from jobs.runs.display import Display  # both cost torch or rich
    from jobs.workers.text_checks import check_texts

    run_dir = Path(config.run.dir or default_run_dir(config)).absolute()
    prepare_run_dir(run_dir)
    command = shlex.join(["python", "-m", f"jobs.{job}", *sys.argv[1:]])
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_lock(run_dir))
        display = stack.enter_context(Display())
        stack.enter_context(remembered_here(run_dir, job, command, display.say))
        display.say(f"run {run_dir}: {' -> '.join(config.stages)} on {config.cluster.name}")
        journal = RedoJournal(run_dir, _whole(command))
        again = journal.left(config.run.redo, config.stages)
        asked = [stage for stage in PIPELINE if stage.name in config.stages]
        models, remarks = checked_models(config, run_dir, again)
        texts = check_texts(config, models, display.say)
        tracker = open_tracker(
            config.tracker, run_dir, run_dir.name, to_dict(config), warn=display.say
        )
        stack.callback(tracker.close)
        clusters = Clusters(run_dir, display, tracker, stack)
        for remark in remarks:  # recorded with the first stage that runs
            clusters.warn(remark)
        context = StageContext(
            config,
            replace(config, data=texts.absolute_config()),
            run_dir,
            command,
            models,
            display,
            tracker,
            partial(clusters.open, config.cluster),
            clusters.warnings,
            texts=texts,
        )
        stack.enter_context(telling(lambda: _so_far(context, asked)))
        last = asked[-1].name if config.run.until is None else config.run.until
        for stage in asked[: [stage.name for stage in asked].index(last) + 1]:
            artifact = _run_stage(stage, _own_context(stage, context, clusters), journal)
            was_redone = stage.name in journal.done
            is_new = was_redone or not artifact.is_reused
            context.statuses[stage.name] = "ran" if is_new else "reused"
            if not artifact.is_reused:
                models.forget_descendants(stage.name)
            models.add(stage.name, artifact.folder)
            tracker.log({f"{stage.name}/duration_s": artifact.record["duration_s"]})
            end_if_asked()
        if last == asked[-1].name:
            journal.close()
    show(write_summary(run_dir, context))
    return run_dir


def checked_models(
    config: Config, run_dir: Path, again: Collection[str], fetch: bool = True
) -> tuple[Models, list[str]]:
    """The models the run starts from, when nothing that can be known now refuses one of its stages.

    Args:
        config: of the run.
        run_dir: its folder.
        again: stages that are to be made again whatever there is of them.
        fetch: download the weights of models of the Hub; without them they are not looked at.

    Returns:
        The models, and what is to be said of them, a line each.

    Raises:
        InputError: something the user can put right, for all stages of the command together.
    """
    gc.disable()  # collections are a fifth of the seconds that a dry run takes
    from jobs.workers.checks import check_cluster, check_inputs  # cost torch and transformers

    gc.enable()
    asked = [stage for stage in PIPELINE if stage.name in config.stages]
    with cluster_errors():
        for stage in asked:
            if not stage.is_derived:
                check_cluster(config.cluster.of_stage(stage.name))
    models = find_models(config, run_dir, PIPELINE, again, fetch)
    # Of a model that is yet to be made the stage itself knows the sizes.
    remarks = [] if "pretrain" in config.stages else check_inputs(config, models, fetch)
    for stage in asked:
        if stage.check is not None:
            stage.check(config.of_stage(stage.name), models)
    return models, remarks


def _so_far(context: StageContext, asked: list[Stage]) -> str:
    """For a run that a signal ends: what is finished, and where the same command continues."""
    finished = ", ".join(context.statuses) or "no stage"
    left = [stage for stage in asked if stage.name not in context.statuses]
    if not left:
        return f"finished: {finished}; run the same command again for the summary"
    where = f"in {left[0].name}{context.display.reached(left[0].name)}; finished: {finished}"
    return f"{where}; run the same command again: {left[0].name} {left[0].resumes}"


def _own_context(stage: Stage, context: StageContext, clusters: Clusters) -> StageContext:
    """What the stage sees: all that the run's stages share, and the cluster that it asks for."""
    own = context.config.of_stage(stage.name)
    return replace(
        context,
        config=own,
        worker_config=context.worker_config.of_stage(stage.name),
        open_cluster=partial(clusters.open, own.cluster),
    )


def _whole(command: str) -> str:
    """The command line without the word by which it stops on the way."""
    words = shlex.split(command)
    return shlex.join(word for word in words if not word.startswith("run.until="))


def _run_stage(stage: Stage, context: StageContext, journal: RedoJournal) -> Artifact:
    """Reuse the stage's finished result, or make it."""
    is_asked = any(name in ("all", stage.name) for name in context.config.run.redo)
    redo = is_asked and stage.name not in journal.done
    may_follow = stage.is_derived or "ran" in context.statuses.values()
    context.notes.clear()
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
        "keep" if stage.may_extend else "replace" if may_follow else "refuse",
    )
    with cluster_errors(), disk_errors(writer.folder):
        metrics = stage.run(context, writer)
        write_recipes(stage, context, writer.folder, metrics)
    metrics["warnings"] = [*context.notes, *context.warnings]
    context.warnings.clear()
    artifact = writer.commit(metrics, context.config.run.seed)
    if is_asked:
        journal.add(stage.name)
    context.display.finish_stage(stage.name, stage.told(metrics) if stage.told else stage.result)
    return artifact


def describe_plan(config: Config) -> list[str]:
    """What a run of this config would do, in lines for a person; writes nothing but what describes
    a model of the Hub, into its cache.

    Raises:
        InputError: what the run would raise before its first stage.
    """
    run_dir = Path(config.run.dir or default_run_dir(config)).absolute()
    with cluster_errors():
        require_answer()
    again = RedoJournal(run_dir, "").left(config.run.redo, config.stages)
    models, remarks = checked_models(config, run_dir, again, fetch=False)
    spec, is_new = config.cluster, "pretrain" in config.stages
    lines = [
        f"run folder: {run_dir}",
        f"model: {models.dense if is_new else config.run.from_ or config.model.path}",
        f"cluster: {spec.name}, {_size(spec)}",
        f"  {spec.description}",
        *(
            [f"preflight: of every node, before the first stage; {SKIPPING}"]
            if is_due(spec)
            else []
        ),
        "stages:",
    ]
    if num_bytes := 0 if is_new else bytes_to_download("model.path", models.dense):
        lines.insert(2, f"  {num_bytes / 1e9:,.1f} GB of weights to download from the Hub first")
    lines[2:2] = [f"  {remark}" for remark in remarks]
    for stage in PIPELINE:
        if stage.name in config.stages:
            is_there = stage.name not in again and (run_dir / stage.name).is_dir()
            state = "finished" if is_there else "to run"
            own = spec.of_stage(stage.name)
            size = "" if own.has_workers_of(spec) else f" ({_size(own)})"
            lines.append(f"  {stage.name:<9} {state:<9} {stage.result}{size}")
            if stage.describe is not None:
                own_config = config.of_stage(stage.name)
                lines += [f"    {line}" for line in stage.describe(own_config, models)]
    return lines


def _size(spec: ClusterSpec) -> str:
    device = "GPU" if spec.uses_gpu else "CPU"
    return f"{spec.num_workers} {device} workers on {spec.num_nodes} node(s)"
