"""What can go wrong between a run and the machines it runs on."""


class ClusterError(Exception):
    """The machines cannot be had as asked; the message says what is missing and what to do."""


class ClusterLostError(Exception):
    """The cluster itself has died under a run; the message says what of it and what to do."""


class HostLostError(Exception):
    """A machine has gone and not come back; the message says which and what to do."""


class WorkFailedError(Exception):
    """Work on a worker ended with an exception.

    Attributes:
        kind: class name of the exception on the worker.
        message: its text.
        traceback: its traceback, for the log.
    """

    def __init__(self, kind: str, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.traceback = traceback
