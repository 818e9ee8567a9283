"""Quantise the model of run.from and leave every zero where it is."""

from jobs.cli.main import main
from jobs.pipeline import command

if __name__ == "__main__":
    main(command("quantize"))
