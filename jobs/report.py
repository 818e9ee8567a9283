"""Make the page, the summary and the table of run.from again."""

from jobs.cli.main import main
from jobs.pipeline import command

COMMAND = command(
    "report", __doc__,
    ("run.from=runs/first",),
    ("run", "tracker", "cluster"),
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
