"""Recover the sparse model of run.from by distillation from its dense teacher."""

from jobs.cli.main import main
from jobs.pipeline import command

COMMAND = command(
    "distill", __doc__,
    ("run.from=runs/first distill.num_tokens=10_000_000", "run.from=runs/first --dry-run"),
    ("run", "model", "data", "prune.pattern", "prune.skip", "distill", "tracker", "cluster"),
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
