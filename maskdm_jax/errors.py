"""Errors that a user can cause or mend. A launcher catches `MaskDMError` once and prints its message."""

import contextlib


class MaskDMError(Exception):
    """Base of all errors of this package; the message names the cause and says what would work."""


class ConfigError(MaskDMError):
    """A setting that cannot work."""


class DataError(MaskDMError):
    """Images or labels that cannot be used."""


class CheckpointError(MaskDMError):
    """A checkpoint that is missing, damaged or does not fit."""


class TorchFileError(MaskDMError):
    """A PyTorch or safetensors file that cannot be read, or a value that cannot be written to one."""


class SamplingError(MaskDMError):
    """Samples that cannot be made as asked."""


class EvaluationError(MaskDMError):
    """Sets of images that cannot be compared as asked."""


class CostError(MaskDMError):
    """A program that cannot be compiled as asked, or does not fit into memory."""


class PreflightError(MaskDMError):
    """A preflight check that failed."""


class DistributedError(MaskDMError):
    """Processes of a run that cannot find each other."""


class NonFiniteLoss(MaskDMError):
    """Loss or gradient became NaN or infinite."""


class Preempted(MaskDMError):
    """SIGTERM received: the run saved its state and stopped."""


@contextlib.contextmanager
def prefixed(kind: type[Exception], prefix: str, causes=ValueError, suffix: str = ""):
    """Raise `kind` with the message `prefix + cause + suffix` in place of exceptions of the types `causes`.

    Pure functions and libraries do not know which setting or file their argument came from; the caller does. Of the
    cause only the first line is kept. A `MaskDMError` passes as it is.
    """
    try:
        yield
    except MaskDMError:
        raise
    except causes as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise kind(prefix + reason + suffix) from error
