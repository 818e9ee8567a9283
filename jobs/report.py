"""Make the page, the summary and the table of run.from again."""

from jobs.cli.main import main
from jobs.pipeline import command

COMMAND = command(
    "report", __doc__, "run model.teacher tracker cluster",
    "run.from=runs/first",
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
