"""Train a small model from scratch, by default on source code that every installation carries.

`python -m jobs.pretrain` writes a model folder with its model card. One process, no cluster: it is
how `model.path=embedded` was made, kept as a command so that anybody can make it again, or another
one of other text (`data=books.txt`) to try a method on.
"""

from __future__ import annotations

from pathlib import Path

from conf.options.pretrain import PretrainConfig
from jobs.cli.command import Command
from jobs.cli.main import main


def run(config: PretrainConfig) -> Path:
    """Make the model; its folder. Raises as `jobs.workers.pretrain.make_model`."""
    from jobs.workers.pretrain import make_model  # costs torch

    return make_model(config)


def describe_plan(config: PretrainConfig) -> list[str]:
    """What `run` would do, in lines for a person; touches nothing."""
    step_tokens = config.batch_size * config.sequence_length
    return [
        f"pretrain: one process on {config.device}, {config.num_threads} threads, no cluster",
        f"  model: {config.num_layers} blocks, hidden_size {config.hidden_size}, "
        + f"vocabulary {config.vocab_size}",
        f"  steps: {config.num_tokens // step_tokens} of {step_tokens} tokens",
        f"  output: {config.out}",
    ]


COMMAND = Command(
    "pretrain", PretrainConfig, run, describe_plan,
    summary=__doc__,
    examples=("seed=1 out=models/small",),
    out="out",
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
