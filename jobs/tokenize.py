"""Turn training text into a store of token rows: once, in parallel, for many recoveries.

`python -m jobs.tokenize model.path=MODEL data.train=TEXT tokenize.out=FOLDER` writes FOLDER, which
`data.train=FOLDER` of `jobs.distill` then reads. Interrupted, the same command resumes at the
shards that are not finished.
"""

from __future__ import annotations

from pathlib import Path

from conf.options.tokenize import TokenizeJobConfig
from jobs.cli.command import Command
from jobs.cli.main import main


def run(config: TokenizeJobConfig) -> Path:
    """Write the store, or what is missing of it; its folder."""
    from jobs.workers.tokenize import make_store  # costs torch

    return make_store(config)


def describe_plan(config: TokenizeJobConfig) -> list[str]:
    """What `run` would do, in lines for a person; touches nothing."""
    sources = config.data.train or ", ".join(config.data.mix) or config.data.calibration
    return [
        f"tokenize: {config.cluster.num_workers} workers on {config.cluster.name}",
        f"  sources: {sources}",
        f"  tokenizer: that of {config.model.path}",
        f"  rows: {config.data.sequence_length} tokens each",
        f"  output: {config.tokenize.out}",
    ]


COMMAND = Command(
    "tokenize", TokenizeJobConfig, run, describe_plan,
    summary=__doc__,
    examples=(
        "tokenize.out=runs/tokens model.path=/models/8b data.train=/data/text",
        "tokenize.out=mix 'data.mix=[7 a.jsonl,3 b.parquet]'",
        "data.train=/data/text --dry-run",
    ),
    uses=(
        "model.path", "data.train", "data.mix", "data.calibration", "data.heldout",
        "data.text_field", "data.separator", "data.heldout_share", "data.sequence_length",
        "tokenize", "cluster",
    ),
    out="tokenize.out",
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
