"""What a user can mend: each error is one line that says what was wrong, where, and what to do."""


class CbmirError(Exception):
    """An error whose message is for the person at the terminal; the CLI prints it without a traceback."""

    exit_code = 1


class ConfigError(CbmirError):
    """A setting that is unknown, of the wrong type, or out of its range."""

    exit_code = 2


class InputError(CbmirError):
    """Something handed in (an archive, a query list, a folder of pictures) cannot be used."""


class TableError(CbmirError):
    """A table is missing, of another shape than `tables.py` says, or belongs to another key."""


class ModelError(CbmirError):
    """A model cannot be loaded, or does not belong to the table it is used with."""


class TrainingError(CbmirError):
    """Training cannot start, or stopped before it had a usable model."""


class EnvironmentProblem(CbmirError):
    """This machine lacks something the jobs need, such as Java 17."""


class JobFailed(CbmirError):
    """Spark gave a job up: a task raised, one of its processes died, or what it reads or writes is not to be had."""


class Busy(CbmirError):
    """Another job writes to this lake, or took its turn while this one stood still; trying again later may help."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, which schedulers take for "try again"


class StorageError(CbmirError, OSError):
    """Object storage does not answer, or not with what was asked for. Names a bucket at most, never an object."""


class NotThere(StorageError, FileNotFoundError):
    """Object storage has no such object or bucket."""


class AccessDenied(StorageError, PermissionError):
    """Object storage refuses these credentials, or there are none."""
