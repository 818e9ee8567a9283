"""Say what a run takes before it starts: memory, what fits, hours, money, disk, and what is served.

`python -m jobs.plan` takes the words of `jobs.prune` and reads the model's config.json alone; it
starts nothing. `python -m jobs.plan budget` asks which model is cheapest over its life, and
`python -m jobs.plan simulate` runs the run on paper, with failures, on 8 to 1,024 GPUs.
"""

from __future__ import annotations

import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from conf.options.plan import SHOWS
from conf.schema import Config, PlanJobConfig
from jobs.cli.command import Command
from jobs.cli.main import main, split_words
from sparsify.errors import InputError
from sparsify.files import write_json, written_whole


def run(config: PlanJobConfig) -> str:
    """The plan as text; also written where plan.out names a folder."""
    from jobs.reporting import plan as text  # costs torch

    found, lines = text.shown(config, _config_of)
    if config.plan.out is not None:
        folder = Path(config.plan.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{config.plan.show}.json", found)
        lines.append(f"written: {folder / config.plan.show}.json")
        if config.plan.show == "simulate":
            with written_whole(folder / "simulate.svg") as path:
                path.write_text(text.simulation_plot(found), encoding="utf-8")
            lines.append(f"written: {folder / 'simulate.svg'}")
    return "\n".join(lines)


def _config_of(command: str) -> Config:
    """The config of a run by the command line in its record.

    In a process of its own: Hydra composes one command in a process, and that is this one.
    """
    words = shlex.split(command)
    if "-m" not in words[:-1]:
        raise InputError(f"its command is none of this project's: {command[:60]}")
    job = words[words.index("-m") + 1].removeprefix("jobs.")
    if job not in ("prune", "distill"):
        raise InputError(f"its command is jobs.{job[:40]}, which neither prunes nor recovers")
    asked = split_words(words[words.index("-m") + 2 :])[0]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_composed, job, asked).result()


def _composed(job: str, words: list[str]) -> Config:
    from jobs.cli.compose import load_config  # imports Hydra

    config: Config = load_config(job, words)
    return config


def describe_plan(config: PlanJobConfig) -> list[str]:
    """What `run` would do."""
    return [f"plan.show={config.plan.show} of model {config.model.path} on {config.cluster.name}; "
            "starts nothing"]  # fmt: skip


COMMAND = Command(
    "plan", PlanJobConfig, run, describe_plan,
    summary=__doc__,
    examples=(
        "model.path=/models/8b +cluster=h100x8 data.sequence_length=8192",
        "model.path=/models/8b +cluster=h100x32 plan.price=2.5 plan.records=[runs/earlier]",
        "budget model.path=/models/8b +cluster=h100x8 plan.served_tokens=1e13",
        "simulate model.path=/models/8b +cluster=h100x32 plan.preemptions_per_day=2",
    ),
    needs="[budget|simulate]",
    out="plan.out",
)  # fmt: skip


def words_of(argv: list[str]) -> list[str]:
    """The command line with its first word, where it names what is shown, as an option; the help
    of such a word is of this command's own options."""
    if argv and argv[0] in SHOWS:
        if {"-h", "--help"} & set(argv):
            return ["plan.", "--help"]
        return [f"plan.show={argv[0]}", *argv[1:]]
    return argv


if __name__ == "__main__":
    main(COMMAND, words_of(sys.argv[1:]))
