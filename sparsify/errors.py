"""The errors this package raises on purpose.

`InputError` is the user's to fix (exit code 2); everything else under `TwofourError` is a run that
could not be finished (exit code 1). Messages are one line: what is wrong, where, what was expected,
what to do.
"""


class TwofourError(Exception):
    """Base of all errors with a message meant for a person."""


class InputError(TwofourError, ValueError):
    """A wrong value, file or combination that the user can put right."""


class CalibrationError(InputError):
    """Calibration data that cannot give usable statistics (too little, not finite, all padding)."""


class NonFiniteError(TwofourError):
    """NaN or infinity in weights, activations, losses or gradients; the message names where."""


class SingularHessianError(TwofourError):
    """No damping step made the Hessian positive definite; the message names the layer."""


class PatternViolationError(TwofourError):
    """A weight that should be zero is not; the message names the layer and the first place."""


class CorruptCheckpointError(TwofourError):
    """A checkpoint that is not as it was written, or not finished; the message names the file."""


class ReplicasDifferError(TwofourError):
    """Copies of the weights that should be equal to the bit are not; the message names workers."""


class StoppedEarlyError(TwofourError):
    """A run that was asked to stop and wrote a checkpoint first; the same command resumes it."""


class MachineLostError(TwofourError):
    """A machine that the run needs has gone and not come back; the same command resumes it."""


def first_line(error: BaseException) -> str:
    """All that an error says, on one line, or its kind where it says nothing: for messages.

    Libraries say what is wrong in the first line and why in those after it.
    """
    return " ".join(str(error).split()) or type(error).__name__
