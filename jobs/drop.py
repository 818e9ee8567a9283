"""Drop layers of a model: a smaller one, which any library loads."""

from jobs.cli.main import main
from jobs.pipeline import command

COMMAND = command(
    "drop", __doc__, "run model data prune.pattern prune.skip drop tracker cluster",
    "run.from=runs/first drop.rule=greedy drop.num_layers=1",
    "model.path=/models/8b drop.share=0.25",
    needs="drop.num_layers=N",
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
