"""Make a dense model 2:4 sparse: prune, recover, evaluate, quantise, export, report."""

from jobs.cli.main import main
from jobs.pipeline import command

if __name__ == "__main__":
    main(command("prune"))
