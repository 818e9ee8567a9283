"""The importers of Ray: starting or joining it, running work on it, hearing its progress."""

import os


def listen_here_alone() -> None:
    """Have a Ray of this machine alone listen on 127.0.0.1 alone; called before Ray is imported.

    Ray reads this when it is imported, and the name says what it does on Linux too. A command that
    only submits its work must not set it: the job's Ray, which has several machines, inherits its
    environment.
    """
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
