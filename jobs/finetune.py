"""Teach the sparse model of run.from, or a dense one, a task: records or text, the zeros held."""

from jobs.cli.main import main
from jobs.pipeline import command

COMMAND = command(
    "finetune", __doc__, "run model data prune.pattern prune.skip finetune tracker cluster",
    "run.from=runs/first finetune.data=records.jsonl",
    "run.from=runs/first finetune.data=records.jsonl --dry-run",
    "model.path=meta-llama/Llama-3.1-8B finetune.data=records.jsonl",
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
