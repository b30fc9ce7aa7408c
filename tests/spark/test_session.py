"""The session: how a missing or wrong Java is reported, and which settings reach Spark."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import config
from cbmir_spark.errors import EnvironmentProblem
from cbmir_spark.spark import session


def _java(folder: Path, printed: str) -> str:
    binary = folder / "bin" / "java"
    binary.parent.mkdir(parents=True)
    binary.write_text(f"#!/bin/sh\necho '{printed}' >&2\n")
    binary.chmod(0o755)
    return str(folder)


def test_a_missing_java_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="Java is missing: no java on the PATH; install OpenJDK 17"):
        session.check_java()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "absent"))
    with pytest.raises(EnvironmentProblem, match="has no bin/java"):
        session.check_java()


@pytest.mark.parametrize("printed", ['openjdk version "11.0.2" 2019-01-15', "some other program"])
def test_a_wrong_java_is_refused(printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", _java(tmp_path / "jdk", printed))
    with pytest.raises(EnvironmentProblem, match="cannot run Spark 4; install OpenJDK 17"):
        session.check_java()


def test_a_right_java_says_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", _java(tmp_path / "jdk", 'openjdk version "17.0.15" 2025-04-15'))
    assert session.check_java() == "17.0.15"


def test_object_storage_settings_reach_hadoop_and_the_sites_own_come_last() -> None:
    settings = config.load(
        overrides=[
            "storage.endpoint=http://127.0.0.1:7070",
            "storage.path_style=false",
            "storage.attempts=5",
            "spark.conf.spark.sql.session.timeZone=Europe/Vienna",
        ],
        environ={},
    )
    wanted = session.properties(settings)
    assert wanted["spark.hadoop.fs.s3a.endpoint"] == "http://127.0.0.1:7070"
    assert wanted["spark.hadoop.fs.s3a.connection.ssl.enabled"] == "false"
    assert wanted["spark.hadoop.fs.s3a.path.style.access"] == "false"
    assert wanted["spark.hadoop.fs.s3a.attempts.maximum"] == "5"
    assert wanted["spark.sql.session.timeZone"] == "Europe/Vienna"
    assert not any("secret" in key or "access.key" in key for key in wanted)


def test_a_local_master_gets_the_defaults_of_one_machine_unless_they_are_set() -> None:
    partitions, snapshot = "spark.sql.shuffle.partitions", "spark.databricks.delta.snapshotPartitions"
    java = "spark.driver.extraJavaOptions"

    def chosen(*overrides: str) -> dict[str, str]:
        return session.properties(config.load(overrides=overrides, environ={}))

    for master, tasks in (("local", 8), ("local[2]", 8), ("local[64]", 64), ("local[*]", max(8, os.cpu_count() or 1))):
        wanted = chosen(f"spark.master={master}")
        assert (wanted[partitions], wanted[snapshot]) == (str(tasks), "4"), master
        assert "-XX:TieredStopAtLevel=1" in wanted[java]
    given = chosen(f"spark.conf.{partitions}=3", f"spark.conf.{java}=-Dx=y")
    assert (given[partitions], given[snapshot], given[java]) == ("3", "4", "-Dx=y")
    assert not {partitions, snapshot, java} & chosen("spark.master=spark://head:7077").keys()


def test_a_session_of_the_caller_decides_by_its_own_master_and_properties(spark: SparkSession) -> None:
    settings = config.load(environ={})
    partitions = "spark.sql.shuffle.partitions"
    assert partitions not in session.properties(settings, {"spark.master": "spark://head:7077"})
    assert session.properties(settings, {"spark.master": "local[64]"})[partitions] == "64"
    # The suite's own number, which is not the default.
    assert session.adopt(spark, settings).conf.get(partitions) == spark.sparkContext.getConf().get(partitions) == "2"


def test_under_spark_submit_a_local_master_gets_them_where_nothing_was_submitted(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    names = ("spark.sql.shuffle.partitions", "spark.databricks.delta.snapshotPartitions", "spark.sql.session.timeZone")
    program.write_text(
        "from cbmir_spark import config\n"
        "from cbmir_spark.spark import session\n"
        "spark = session.build(config.load(environ={}), 'test')\n"
        f"print('SEEN', *(spark.conf.get(name) for name in {names}))\n"
        "spark.stop()\n"
    )
    submit = session.spark_home() / "bin" / "spark-submit"
    asked = ["--master", "local[1]", "--driver-memory", "1g", "--conf", f"{names[1]}=9", "--conf", f"{names[2]}=CET"]
    done = subprocess.run(
        [submit, *asked, program], env=os.environ | {"PYSPARK_PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SEEN 8 9 CET" in done.stdout


def test_the_session_is_local_quiet_and_speaks_delta(spark: SparkSession) -> None:
    conf = spark.sparkContext.getConf()
    assert conf.get("spark.driver.host") == "127.0.0.1"
    assert conf.get("spark.ui.enabled") == "false"
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    assert "DeltaCatalog" in str(spark.conf.get("spark.sql.catalog.spark_catalog"))
