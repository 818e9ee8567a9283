"""Quantize the model of run.from and leave every zero where it is."""

from jobs.cli.main import main
from jobs.pipeline import command

COMMAND = command(
    "quantize", __doc__,
    ("run.from=runs/first quantize.method=rtn",),
    ("run", "model", "data", "prune.pattern", "prune.skip", "quantize", "evaluate", "tracker",
     "cluster"),
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
