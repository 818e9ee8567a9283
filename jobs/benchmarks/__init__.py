"""One file for each benchmark of `python -m jobs.bench`."""
