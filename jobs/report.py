"""The report is the last stage of the pipeline: this says how to make it again."""

import sys

if __name__ == "__main__":
    hint = "python -m jobs.prune 'stages=[report]' run.from=RUN run.dir=RUN"
    print(f"error: report is a stage of the pipeline; run {hint}", file=sys.stderr)
    sys.exit(2)
