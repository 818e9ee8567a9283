"""Train a dense model from random weights on text, a small one or a large one; resumable."""

from jobs.cli.main import main
from jobs.pipeline import command

COMMAND = command(
    "pretrain", __doc__,
    "run data pretrain evaluate.num_tokens evaluate.batch_size tracker cluster",
    "run.dir=runs/small data.calibration=books.txt pretrain.num_tokens=20_000_000",
    "pretrain.config=meta-llama/Llama-3.2-1B +cluster=h100x8",
    needs="run.dir=PATH",
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
