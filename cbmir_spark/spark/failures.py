"""Why Spark gave a job up: one line for the person at the terminal, out of the pages that Spark says it in."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JError, Py4JNetworkError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from cbmir_spark.config import DEBUG_VARIABLE
from cbmir_spark.errors import JobFailed

_LONGEST = 500
_ENDS_SECONDS = 10.0
# What a Python worker raised: the frames of a traceback are indented, what was raised is not. A Java trace may follow.
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:[ ]+.*\n)*(?P<raised>(?:(?!\s+at ).*\n?)*)")
# What Java raised, the outermost first: in py4j's message below a colon, then behind "Caused by".
_JAVA = re.compile(r"^(?:Caused by)?: (?P<raised>(?:[\w$]+\.)+[\w$]+: \S(?s:(?!\n\s+(?:at |\.\.\. )).)*)", re.M)
_OF_A_TASK = re.compile(r".* most recent failure: (?:Lost task [^\n]*?\)(?: \([^()\n]*\))?: )?")
_CLASS = re.compile(r"(?P<package>(?:[\w$]+\.)*)(?P<name>[A-Za-z_$][\w$]*): (?P<said>.+)", re.S)
# Codes, and advice on Spark's own settings that finds nothing where a worker was killed.
_NOISE = re.compile(r"\s*SQLSTATE: \w+|\. Consider setting 'spark\..*", re.S)
_OURS = "cbmir_spark.errors."


@contextmanager
def told(spark: SparkSession, job: str) -> Iterator[None]:
    """Turn what Spark raises while the block runs into a JobFailed that says in a line what happened."""
    try:
        yield
    except (PySparkException, Py4JError, ConnectionError) as error:
        if not isinstance(error, (ConnectionError, Py4JNetworkError)):
            line = cause(str(error))
        elif _java_ended(spark):
            line = "its Java process ended; if the system ran out of memory, lower spark.driver_memory"
        else:
            raise
        raise JobFailed(f"Spark gave the {job} job up: {line} ({DEBUG_VARIABLE}=1 shows all of it)") from error


def cause(text: str) -> str:
    """What it began with, of all that a PySparkException or Py4JError says; a line of bounded length.

    What a Python worker raised, else the innermost Java exception that says anything, else the first line. Errors of
    ours say what to do and stand alone, others behind the name of their class.
    """
    if raised := [found["raised"] for found in _TRACEBACK.finditer(text)]:
        said = raised[-1]
    elif raised := [found["raised"] for found in _JAVA.finditer(text)]:
        said = _first_line(_OF_A_TASK.sub("", raised[-1], count=1))
    else:
        said = _first_line(text)
    said = " ".join(_NOISE.sub("", said).split())
    named = _CLASS.fullmatch(said)
    if named and (named["package"] == _OURS or named["name"] == "SparkException"):
        said = named["said"]
    elif named and named["package"]:
        said = f"{named['name']}: {named['said']}"
    said = said.rstrip(".; ")
    return said if len(said) <= _LONGEST else said[: _LONGEST - 1] + "…"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said of why"])[0]


def _java_ended(spark: SparkSession) -> bool:
    """Whether the Java process that this one started is gone. False where another one started it (spark-submit)."""
    process: subprocess.Popen[bytes] | None = getattr(spark.sparkContext._gateway, "proc", None)
    if process is None:
        return False
    try:
        # Its sockets are closed some time before it has ended.
        process.wait(_ENDS_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True
