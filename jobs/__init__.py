"""The commands: `python -m jobs.<command>`. jobs/pipeline.py is the file to read first."""
