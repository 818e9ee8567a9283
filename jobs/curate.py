"""Make a better corpus of a corpus: filters, no copies, no evaluation texts, sources in proportion.

`python -m jobs.curate 'curate.sources=[corpus.jsonl]' curate.out=FOLDER` writes FOLDER/data, which
`data.train` and `data.calibration` then read, and what was dropped and why: curation.json, a page.
Interrupted, the same command resumes at the shards that are not finished.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import ModuleType

from conf.options.curate import CurateJobConfig, shares_of
from jobs.cli.command import Command
from jobs.cli.main import main


def _work() -> ModuleType:
    from jobs.workers import curate  # costs torch

    return curate


def run(config: CurateJobConfig) -> Path:
    """Write the corpus, or what is missing of it, and its page; the folder of its data."""
    from jobs.reporting.curation import report  # costs jinja2

    work = _work()
    folder: Path = work.make_corpus(config)
    report(folder, shlex.join(["python", "-m", "jobs.curate", *sys.argv[1:]]))
    return folder / str(work.DATA)


def describe_plan(config: CurateJobConfig) -> list[str]:
    """What `run` would do, in lines for a person; touches nothing."""
    curate = config.curate
    shards = _work().check(config)
    steps = [
        *(["lengths"] if any((curate.min_chars, curate.max_chars, curate.min_words,
                              curate.max_words)) else []),
        *([f"languages {' '.join(curate.languages)}"] if curate.languages else []),
        *curate.quality,
        *([f"{curate.against_words} words of {', '.join(curate.against)}"]
          if curate.against else []),
        *(["exact copies"] if curate.exact else []),
        *([f"near copies from {curate.near:g} on"] if curate.near is not None else []),
    ]  # fmt: skip
    found = zip(shares_of(curate), shards, strict=True)
    return [
        f"curate: {config.cluster.num_workers} workers on {config.cluster.name}",
        *(
            f"  source {name}: {count} shards, share {share:g}"
            for (share, name), (_, count) in found
        ),
        f"  dropped: {', '.join(steps) or 'nothing'}",
        f"  shares: {curate.mixing}, in {curate.unit}",
        f"  output: {curate.out}, {curate.format}",
    ]


COMMAND = Command(
    "curate", CurateJobConfig, run, describe_plan,
    summary=__doc__,
    examples=(
        "curate.sources=[/data/text] curate.out=runs/curated",
        "'curate.sources=[a.jsonl,b.parquet]' 'curate.quality=[gopher_quality]' "
        "'curate.against=[gsm8k-test.jsonl]'",
        "'curate.sources=[0.7 a.jsonl,0.3 b.jsonl]' curate.mixing=proportions",
    ),
    uses=("curate", "data.separator", "cluster"),
    out="curate.out",
)  # fmt: skip

if __name__ == "__main__":
    main(COMMAND)
