"""Score the model of run.from on held-out text, against its dense teacher."""

from jobs.cli.main import main
from jobs.pipeline import command

if __name__ == "__main__":
    main(command("evaluate"))
