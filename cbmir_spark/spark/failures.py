"""Reduce the pages that Spark prints when it aborts a job to one line for the person at the terminal."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JError, Py4JNetworkError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from cbmir_spark import extras
from cbmir_spark.config import DEBUG_VARIABLE
from cbmir_spark.errors import JobFailed

_MAX_LENGTH = 500
_JAVA_EXIT_SECONDS = 10.0
# An exception of a Python worker: a traceback's frames are indented, the exception is not. A Java trace may follow.
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:[ ]+.*\n)*(?P<raised>(?:(?!\s+at ).*\n?)*)")
# Java's exceptions, the outermost first: in py4j's message below a colon, then behind "Caused by".
_JAVA = re.compile(r"^(?:Caused by)?: (?P<raised>(?:[\w$]+\.)+[\w$]+: \S(?s:(?!\n\s+(?:at |\.\.\. )).)*)", re.M)
_TASK_PREFIX = re.compile(r".* most recent failure: (?:Lost task [^\n]*?\)(?: \([^()\n]*\))?: )?")
_CLASS = re.compile(r"(?P<package>(?:[\w$]+\.)*)(?P<name>[A-Za-z_$][\w$]*): (?P<text>.+)", re.S)
# Codes, and advice on Spark's settings that does not help if a worker was killed.
_NOISE = re.compile(r"\s*SQLSTATE: \w+|\. Consider setting 'spark\..*", re.S)
_OURS = "cbmir_spark.errors."
_LACKING = re.compile(r"ModuleNotFoundError: No module named '(?P<package>\w+)[\w.]*'")


@contextmanager
def translate_errors(spark: SparkSession, job: str) -> Iterator[None]:
    """Raise JobFailed with the cause in one line if Spark aborts a job of the block."""
    try:
        yield
    except (PySparkException, Py4JError, ConnectionError) as error:
        if not isinstance(error, (ConnectionError, Py4JNetworkError)):
            line = cause(str(error))
        elif _java_ended(spark):
            line = "its Java process ended; if the system ran out of memory, lower spark.driver_memory"
        else:
            raise
        raise JobFailed(f"Spark aborted the {job} job: {line} ({DEBUG_VARIABLE}=1 shows the whole trace)") from error


def cause(text: str) -> str:
    """Extract the root cause from the text of a PySparkException or Py4JError, as a line of bounded length.

    That is the exception of a Python worker, else the innermost Java exception with a message, else the first line.
    Errors of this package stand alone, since they say what to do; others follow the name of their class.
    """
    if raised := [found["raised"] for found in _TRACEBACK.finditer(text)]:
        line = raised[-1]
    elif raised := [found["raised"] for found in _JAVA.finditer(text)]:
        line = _first_line(_TASK_PREFIX.sub("", raised[-1], count=1))
    else:
        line = _first_line(text)
    line = " ".join(_NOISE.sub("", line).split())
    named = _CLASS.fullmatch(line)
    if lacking := _LACKING.fullmatch(line):
        line = _without(lacking["package"])
    elif named and (named["package"] == _OURS or named["name"] == "SparkException"):
        line = named["text"]
    elif named and named["package"]:
        line = f"{named['name']}: {named['text']}"
    line = line.rstrip(".; ")
    return line if len(line) <= _MAX_LENGTH else line[: _MAX_LENGTH - 1] + "…"


def _without(package: str) -> str:
    """Say what to install where tasks run: the driver's own Python was checked before."""
    extra = extras.extra_of(package)
    install = extras.install(extra) if extra else f"install {package}"
    return f"the Python of the executors has no {package}: in it, {install}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0]


def _java_ended(spark: SparkSession) -> bool:
    """True if the Java process that this one started has ended; False if spark-submit started it."""
    process: subprocess.Popen[bytes] | None = getattr(spark.sparkContext._gateway, "proc", None)
    if process is None:
        return False
    try:
        # It closes its sockets some time before it ends.
        process.wait(_JAVA_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True
