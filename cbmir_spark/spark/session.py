"""Build the SparkSession, here and nowhere else; a comment gives the reason for each surprising setting."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyspark
from py4j.protocol import Py4JJavaError
from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkRuntimeError
from pyspark.sql import SparkSession

from cbmir_spark.config import Settings, conf_folder, debugging
from cbmir_spark.errors import EnvironmentProblem
from cbmir_spark.spark import interrupts, java_output

JAVA_VERSIONS = (17, 21)
LOOPBACK = "127.0.0.1"
S3A_RETRIES = "3"
_DELTA_EXTENSION = "io.delta.sql.DeltaSparkSessionExtension"
_DELTA_CATALOG = "org.apache.spark.sql.delta.catalog.DeltaCatalog"
_HADOOP = "spark.hadoop."


def build(settings: Settings, job: str) -> SparkSession:
    """Build a session for `local[*]`, a standalone or Kubernetes master, or join the one that spark-submit started.

    Under spark-submit no submitted property is overridden: missing ones are added. Runs on the driver. Raises
    EnvironmentProblem if Java or Delta's jars are missing.
    """
    submitted = under_spark_submit()
    if not submitted:
        check_java()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    if not submitted and settings.spark.master.startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", LOOPBACK)
    given = _submitted_properties() if submitted else {}
    wanted = {key: value for key, value in properties(settings, given).items() if key not in given}
    if not submitted:
        wanted |= {"spark.master": settings.spark.master, "spark.driver.memory": settings.spark.driver_memory}
        wanted |= _jars()
        wanted.setdefault("spark.driver.extraJavaOptions", "")
        wanted["spark.driver.extraJavaOptions"] += f" -Dlog4j2.configurationFile={_log_settings()}"
        if debugging() or settings.spark.log_level != "ERROR":
            wanted["spark.driver.extraJavaOptions"] += f" -Dcbmir.traces={settings.spark.log_level}"
    builder = SparkSession.builder.appName(f"cbmir {job}")
    for key, value in wanted.items():
        builder = builder.config(key, value)
    try:
        with interrupts.keep_handler(), java_output.to_stderr() if _starts_java() else nullcontext():
            spark = builder.getOrCreate()
    except (PySparkRuntimeError, Py4JJavaError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentProblem(
            f"Spark did not start: {lines[0]}; run `cbmir doctor` to look for the usual causes"
        ) from error
    spark.sparkContext.setLogLevel(settings.spark.log_level)
    _check_delta(spark)
    return spark


def adopt(spark: SparkSession, settings: Settings) -> SparkSession:
    """Derive a session for our jobs from one that was built elsewhere, whose settings stay as they are.

    The new session shares its context, and with it master, memory and jars. Raises EnvironmentProblem if Delta is
    missing. Runs on the driver.
    """
    if is_stopped(spark):
        raise EnvironmentProblem("the given Spark session was stopped: give one that runs, or leave spark out")
    _check_delta(spark)
    derived = spark.newSession()
    if _DELTA_EXTENSION not in (derived.conf.get("spark.sql.extensions", None) or ""):
        raise EnvironmentProblem(
            f"the given Spark session has no Delta extension: build it with spark.sql.extensions={_DELTA_EXTENSION} "
            f"and spark.sql.catalog.spark_catalog={_DELTA_CATALOG}, or leave spark out"
        )
    given = dict(spark.sparkContext.getConf().getAll())
    for key, value in properties(settings, given).items():
        if key.startswith(_HADOOP):
            # Reads and writes of a session take Hadoop's properties from its own settings as well.
            derived.conf.set(key.removeprefix(_HADOOP), value)
        elif derived.conf.isModifiable(key):
            derived.conf.set(key, value)
    return derived


def running() -> SparkSession | None:
    """The session of this process whose Spark runs already, None if there is none or spark-submit started it."""
    found = SparkSession.getActiveSession() if not under_spark_submit() else None
    return None if found is None or is_stopped(found) else found


def is_stopped(spark: SparkSession) -> bool:
    """True if the session's Spark was stopped, so that it cannot be used any more."""
    return spark.sparkContext._jsc is None


def properties(settings: Settings, given: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The Spark properties that the jobs rely on; `spark.conf` of the settings comes last and wins.

    `given` are those of a driver that runs already, started by spark-submit or in a notebook: its master decides
    whether the defaults of one machine apply, and none of them replaces a property that it has.
    """
    storage = settings.storage
    wanted = {
        "spark.sql.extensions": _DELTA_EXTENSION,
        "spark.sql.catalog.spark_catalog": _DELTA_CATALOG,
        # Timestamps are instants: a driver in another time zone must not shift them.
        "spark.sql.session.timeZone": "UTC",
        # Rows carry 64 KB of pixels or 16 KB of vector: Arrow's and Parquet's default batches would be 655 and 268 MB.
        "spark.sql.execution.arrow.maxRecordsPerBatch": "256",
        "spark.sql.parquet.columnarReaderBatchSize": "256",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        # Readers decode whole row groups; one of Parquet's default size would hold 2,000 frames of 64 KB.
        "spark.hadoop.parquet.block.size": str(8 * 2**20),
        # A commit that is retried after a lost reply is recognised, instead of landing twice.
        "spark.databricks.delta.commit.idempotencyCheck.enabled": "true",
        # Delta takes file:///x and file:/x, Hadoop's spelling of it, for two locations of one new table.
        "spark.databricks.delta.legacy.allowAmbiguousPathsInCreateTable": "true",
        # glibc maps and unmaps each block of 128 KiB or more, which costs a fifth of the time of decoding pictures in
        # page faults; 32 MiB is the highest threshold that it accepts.
        "spark.executorEnv.MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "spark.executorEnv.MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
        # Tasks of tens of milliseconds would mostly wait for their worker to start.
        "spark.python.daemon.module": "cbmir_spark.spark.python_workers",
        # A speculative copy of a task would decode or embed everything twice.
        "spark.speculation": "false",
        # Spark creates its warehouse folder, which the jobs do not use, in the current one by default.
        "spark.sql.warehouse.dir": Path(tempfile.gettempdir(), f"cbmir-warehouse-{os.getuid()}").as_uri(),
        # The progress bar draws over log files.
        "spark.ui.showConsoleProgress": "false",
        # The UI shows settings and paths, which may hold identifiers, to anyone on the network.
        "spark.ui.enabled": "false",
        "spark.hadoop.fs.s3a.endpoint.region": storage.region,
        "spark.hadoop.fs.s3a.path.style.access": str(storage.path_style).lower(),
        # As many attempts as for the package's other requests. S3A retries around them, by default so often and with
        # waits that double, that a server which keeps answering "slow down" would block a job for hours.
        "spark.hadoop.fs.s3a.attempts.maximum": str(storage.attempts),
        "spark.hadoop.fs.s3a.retry.limit": S3A_RETRIES,
        "spark.hadoop.fs.s3a.retry.throttle.limit": S3A_RETRIES,
        # By default a silent connection blocks for 200 seconds. Writes of big parts are answered late.
        "spark.hadoop.fs.s3a.connection.timeout": "60s",
    }
    if storage.endpoint:
        wanted["spark.hadoop.fs.s3a.endpoint"] = storage.endpoint
        wanted["spark.hadoop.fs.s3a.connection.ssl.enabled"] = str(storage.endpoint.startswith("https")).lower()
    master = given.get("spark.master", settings.spark.master)
    if master.startswith("local"):
        # Spark's 200 partitions and Delta's 50 suit clusters. On one machine most of the time goes into starting tasks.
        local = {
            "spark.sql.shuffle.partitions": str(max(8, _local_cores(master))),
            "spark.databricks.delta.snapshotPartitions": "4",
        }
        wanted |= {key: value for key, value in local.items() if key not in given}
    if master.startswith("local") and not given:
        # Decoding and numpy need the cores more than Java's optimising compiler does. Without it the JVM would reserve
        # only 48 MB for compiled code, and compile nothing more once they are full.
        wanted["spark.driver.extraJavaOptions"] = (
            "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m -XX:+UseSerialGC"
        )
        # A laptop's name may resolve to an address that its VPN or Wi-Fi has just lost.
        wanted["spark.driver.host"] = LOOPBACK
        wanted["spark.driver.bindAddress"] = LOOPBACK
    return wanted | settings.spark.conf


def _local_cores(master: str) -> int:
    """The cores of `local`, `local[N]` or `local[*]`."""
    number = re.match(r"local\[(\d+)", master)
    return int(number[1]) if number else 1 if master == "local" else os.cpu_count() or 1


def _submitted_properties() -> dict[str, str]:
    # A SparkConf is empty until this process is connected to the JVM of spark-submit.
    SparkContext._ensure_initialized()
    return dict(SparkConf().getAll())


def _starts_java() -> bool:
    """True if this process has yet to start its JVM."""
    return not under_spark_submit() and SparkContext._gateway is None


def under_spark_submit() -> bool:
    """True if spark-submit started this process, and so decided on master, memory and jars."""
    return "PYSPARK_GATEWAY_PORT" in os.environ


def check_java() -> str:
    """The version of the Java that Spark will start, as `17.0.15`. Raises EnvironmentProblem saying what to install."""
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    advice = "install OpenJDK 17 (Debian: openjdk-17-jre-headless), or set JAVA_HOME to one"
    if not java or not os.path.exists(java):
        place = f"JAVA_HOME={home} has no bin/java" if home else "no java on the PATH"
        raise EnvironmentProblem(f"Java is missing: {place}; {advice}")
    printed = subprocess.run([java, "-version"], capture_output=True, text=True).stderr
    found = re.search(r'version "(\d+)([^"]*)"', printed)
    if not found or int(found[1]) not in JAVA_VERSIONS:
        version = found[1] + found[2] if found else "of unknown version"
        raise EnvironmentProblem(f"Java {version} at {java} cannot run Spark 4; {advice}")
    return found[1] + found[2]


def spark_home() -> Path:
    """The folder of the Spark that will run: SPARK_HOME, or the one inside the pyspark package."""
    return Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent)


def has_delta_jars() -> bool:
    """True if Delta's jars are in Spark's folder, where deploy/fetch_jars.py puts them."""
    return any((spark_home() / "jars").glob("delta-spark_*.jar"))


def _log_settings() -> str:
    return (conf_folder() / "log4j2.properties").as_uri()


def _jars() -> dict[str, str]:
    """Properties that let Spark resolve the jars when it starts, if its folder lacks them."""
    if has_delta_jars():
        return {}
    file = conf_folder() / f"spark-{spark_line()}.conf"
    if not file.is_file():
        raise EnvironmentProblem(
            f"no jars of Delta are known for Spark {pyspark.__version__}: install a version that cbmir-spark names, "
            f"or put the jars for it into {spark_home() / 'jars'}"
        )
    pairs = dict(
        line.split(None, 1) for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("spark.jars.")
    )
    return {key: value.strip() for key, value in pairs.items()}


def spark_line() -> str:
    """The line of releases of the installed pyspark, as `4.2`."""
    return ".".join(pyspark.__version__.split(".")[:2])


def _check_delta(spark: SparkSession) -> None:
    jvm: Any = spark.sparkContext._jvm
    try:
        jvm.java.lang.Thread.currentThread().getContextClassLoader().loadClass("io.delta.tables.DeltaTable")
    except Py4JJavaError:
        raise EnvironmentProblem(
            "Delta's jars are not on Spark's class path: run deploy/fetch_jars.py for this Spark, "
            f"or submit with --properties-file conf/spark-{spark_line()}.conf"
        ) from None
