"""Score the model of run.from on held-out text, against its dense teacher."""

from jobs.cli.main import main
from jobs.pipeline import command

COMMAND = command(
    "evaluate", __doc__,
    ("run.from=runs/first evaluate.num_tokens=100_000",),
    ("run", "model", "data", "prune.pattern", "prune.skip", "evaluate", "tracker", "cluster"),
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
