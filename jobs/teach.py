"""Sample a dense model's predictions of a token store: once, for many recoveries.

`python -m jobs.teach model.path=MODEL data.train=TOKENS teach.out=FOLDER` writes FOLDER, which
`distill.teacher_cache=FOLDER` of `jobs.distill` then reads in place of the teacher. Interrupted,
the same command resumes at the files that are not finished.
"""

from __future__ import annotations

from pathlib import Path

from conf.options.teach import TeachJobConfig
from jobs.cli.command import Command
from jobs.cli.main import main


def run(config: TeachJobConfig) -> Path:
    """Write the cache, or what is missing of it; its folder."""
    from jobs.workers.teach import make_cache  # costs torch

    return make_cache(config)


def describe_plan(config: TeachJobConfig) -> list[str]:
    """What `run` would do, in lines for a person; reads the store's manifest and the model's."""
    from jobs.workers import teach  # costs torch

    return teach.describe_plan(config)


COMMAND = Command(
    "teach", TeachJobConfig, run, describe_plan,
    summary=__doc__,
    examples=(
        "teach.out=runs/teacher model.path=/models/8b data.train=/data/tokens",
        "data.train=/data/tokens teach.num_samples=64 --dry-run",
    ),
    uses=("model.path", "model.dtype", "data.train", "data.isolate_documents", "teach", "cluster"),
    needs="data.train=PATH",
    out="teach.out",
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
