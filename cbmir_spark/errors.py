"""The errors that a user can act on: one line that says what is wrong, where, and what to do.

The command line prints that line without a traceback and ends with the error's exit status: 2 for settings and
arguments, 75 where trying again later helps, 1 for everything else. Any other exception is a bug.
"""


class CbmirError(Exception):
    """The base of all errors that this package raises on purpose; catch it to handle every one of them."""

    exit_code = 1


class ConfigError(CbmirError):
    """A setting is unknown, renamed, of the wrong type or out of bounds: correct it where the message says."""

    exit_code = 2


class InputError(CbmirError):
    """An archive, a query list or another input cannot be used: correct the input, or its path."""


class TableError(CbmirError):
    """A table is missing, damaged, of another schema or of another key: run the job that the message names."""


class ModelError(CbmirError):
    """A model is missing, damaged, or does not belong to the index: train, index or choose another model."""


class TrainingError(CbmirError):
    """Training cannot start, or ended without a usable model: change the data or settings that the message names."""


class EnvironmentProblem(CbmirError):
    """The machine or its storage lacks what jobs need, such as Java 17: `cbmir doctor` lists what is missing."""


class JobFailed(CbmirError):
    """Spark aborted a job: a task failed, a process died, or an input or output is unavailable."""


class Busy(CbmirError):
    """Another job is writing to the lake, or took over its lease: try again later."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, which schedulers understand as "try again".


class StorageError(CbmirError, OSError):
    """Object storage is unreachable or gives an unusable answer. Messages name buckets, never objects."""


class NotFound(StorageError, FileNotFoundError):
    """Object storage has no such object or bucket."""


class AccessDenied(StorageError, PermissionError):
    """Object storage refuses the credentials, or there are none."""
