"""Recover the sparse model of run.from by distillation from its dense teacher."""

from jobs.cli.main import main
from jobs.pipeline import command

if __name__ == "__main__":
    main(command("distill"))
