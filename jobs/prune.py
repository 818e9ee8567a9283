"""Prune a model, recover it, evaluate it, quantize it, export it and report on it."""

from jobs.cli.main import main
from jobs.pipeline import command

COMMAND = command("prune", __doc__, (
    "run.dir=runs/first",
    "prune.pattern=4:8 'prune.baselines=[wanda]'",
    "model=llama-3.2-1b data.train=/data 'stages=[prune,evaluate]'",
    "+cluster=h100x32 model.path=/models/8b data.train=/data --print-config",
    "--multirun prune.method=wanda,sparsegpt run.seed=0,1 recipe=quick",
))  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
