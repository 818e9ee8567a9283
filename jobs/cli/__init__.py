"""From a command line to a typed, checked config and an exit code."""
