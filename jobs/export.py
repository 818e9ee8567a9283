"""Write the model of run.from as files to deploy."""

from jobs.cli.main import main
from jobs.pipeline import command

COMMAND = command(
    "export", __doc__,
    ("run.from=runs/first export.dtype=bfloat16",),
    ("run", "model", "prune.pattern", "prune.skip", "export", "tracker", "cluster"),
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
