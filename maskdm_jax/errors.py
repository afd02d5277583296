"""Errors that a user can cause or fix. A launcher catches `MaskDMError` once and prints its message."""

import contextlib


class MaskDMError(Exception):
    """Base of all errors of this package; the message names the cause and says what would work.

    Attributes:
      status: exit status of a program that ends with this error. 1: starting again may help. 75: the state was saved
        and the same command resumes. 78: the same command can only fail again. 130: Ctrl-C.
    """

    status = 1


class ConfigError(MaskDMError):
    """An invalid setting."""

    status = 78


class DataError(MaskDMError):
    """Images or labels that cannot be used."""


class CheckpointError(MaskDMError):
    """A checkpoint that is missing, damaged or does not fit."""


class TorchFileError(MaskDMError):
    """A PyTorch or safetensors file that cannot be read, or a value that cannot be written to one."""

    status = 78


class SamplingError(MaskDMError):
    """A request for samples that is invalid."""

    status = 78


class EvaluationError(MaskDMError):
    """Sets of images that cannot be compared."""

    status = 78


class CostError(MaskDMError):
    """A program that does not compile, or does not fit into memory."""

    status = 78


class PreflightError(MaskDMError):
    """A preflight check that failed."""


class DistributedError(MaskDMError):
    """Processes that cannot join a run."""


class NonFiniteLoss(MaskDMError):
    """Loss or gradient became NaN or infinite."""

    status = 78


class Interrupted(MaskDMError):
    """Ctrl-C stopped the run."""

    status = 130


class Preempted(MaskDMError):
    """SIGTERM received: the run saved its state and stopped."""

    status = 75


@contextlib.contextmanager
def prefixed(kind: type[Exception], prefix: str, causes=ValueError, suffix: str = ""):
    """Raise `kind` with the message `prefix + cause + suffix` in place of exceptions of the types `causes`.

    Pure functions and libraries do not know which setting or file their argument came from; the caller does. The
    message contains only the first line of the cause. A `MaskDMError` passes unchanged.
    """
    try:
        yield
    except MaskDMError:
        raise
    except causes as error:
        raise kind(prefix + first_line(error) + suffix) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters; without a message, the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
