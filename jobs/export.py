"""Write the model of run.from as folders to load, serve and share."""

from jobs.cli.main import main
from jobs.pipeline import command

if __name__ == "__main__":
    main(command("export"))
