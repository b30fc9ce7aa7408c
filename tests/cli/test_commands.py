"""Each command as its users meet it: help, statuses, and what it refuses before Spark starts."""

import re
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import __version__, config
from cbmir_spark.api import Lake
from cbmir_spark.cli import command
from cbmir_spark.synthetic.wrap import LABEL_COLUMNS
from tests.conftest import Cbmir
from tests.support.tiny_lake import Drawn, key_of, publish

COMMANDS = (
    "ingest", "train", "index", "retrieve", "evaluate", "demo", "runs", "features", "verify", "forget", "remap",
    "upgrade", "vocabulary", "wrap", "config", "doctor",
)  # fmt: skip


@pytest.fixture
def without_spark(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lake whose session must not be needed."""

    def refuse(lake: Lake, job: str) -> None:
        raise AssertionError(f"{job} starts Spark")

    monkeypatch.setattr(Lake, "_spark", refuse)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_the_version(cbmir: Cbmir) -> None:
    assert cbmir("--version") == (0, f"cbmir_spark {__version__}\n", "")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command_in_its_group(cbmir: Cbmir, flag: str) -> None:
    status, out, _ = cbmir(flag)
    assert status == 0
    for panel in (command.JOBS, command.ANSWERS, command.UPKEEP, command.SETUP):
        assert f"─ {panel} ─" in out
    listed = re.findall(r"^│ ([a-z]+) ", out, re.MULTILINE)
    assert sorted(name for name in listed if name in COMMANDS) == sorted(COMMANDS)
    assert "3 no query answered" in " ".join(out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_of_its_own(cbmir: Cbmir, name: str) -> None:
    status, out, err = cbmir(name, "-h")
    assert (status, err) == (0, "")
    for flag in ("--config", "--set", "--json", "--log-json"):
        assert flag in out, flag


def test_wrap_names_the_columns_that_it_reads(cbmir: Cbmir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = cbmir("wrap", "--help")
    assert all(re.search(rf"\b{name}\b", out) for name in LABEL_COLUMNS), out


@pytest.mark.usefixtures("without_spark")
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("ingest", "--archive", "{}/absent"), 1, "does not exist"),
        (("ingest", "--archive", "{}/empty", "--lake", "{}/file"), 1, "is a file"),
        (("train", "--preset", "alexnett"), 2, "alexnett"),
        (("train", "--sweep", "{}/absent.yaml"), 2, "absent.yaml"),
        (("retrieve",), 1, "no query list"),
        (("retrieve", "--queries", "{}/absent.csv"), 1, "absent.csv: No such file"),
        (("retrieve", "--queries", "{}/file"), 1, "lacks column query_id"),
        (("retrieve", "--queries", "{}/queries.csv", "--out", "{}/full"), 1, "not empty"),
        (("retrieve", "--queries", "{}/queries.csv", "--level", "study"), 2, "retrieval.level"),
    ],
)
def test_what_can_be_checked_is_refused_before_spark_starts(
    cbmir: Cbmir, tmp_path: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "queries.csv").write_text(f"query_id,image_id\nq,{'0' * 32}\n")
    before = files_below(tmp_path)
    given = [argument.format(tmp_path) for argument in arguments]
    given += [] if "--lake" in given else ["--lake", str(tmp_path / "lake")]
    ended, out, err = cbmir(*given)
    assert (ended, out) == (status, ""), err
    assert said in err and err.count("\n") == 1, err
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", ["retrieve", "evaluate", "verify", "index", "doctor"])
def test_without_the_key_of_its_lake_a_command_ends_in_a_line(
    cbmir: Cbmir, spark: SparkSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(command, "lake_for", lambda settings: Lake(settings, spark))
    settings = config.load(overrides=[f"lake.uri={tmp_path / 'lake'}"], environ={})
    publish(spark, settings, [Drawn("a", "p", "CT", "CHEST")])
    assert key_of(settings)
    (key_file,) = [path for path in tmp_path.rglob("*.key") if path.is_file()]
    key_file.unlink()
    (tmp_path / "queries.csv").write_text(f"query_id,image_id\nq,{'0' * 32}\n")
    before = files_below(tmp_path)
    more = {"retrieve": ["--queries", str(tmp_path / "queries.csv")], "doctor": ["--json"]}
    ended, out, err = cbmir(name, "--lake", str(tmp_path / "lake"), *more.get(name, []))
    assert ended == (1 if name == "doctor" else 2), err
    said = " ".join((out + err).split())
    assert "pseudonym.key is missing: restore it" in said
    if name != "doctor":
        assert out == "" and err.count("\n") == 1
    # The lease that `index` takes leaves its lock; no key is among what there is.
    assert {path for path in files_below(tmp_path) if "leases" not in path} == set(before)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(13, "check its permissions"), (30, "mounted read-only"), (28, "free some space"), (20, "is a file")],
)
def test_errors_of_the_file_system_end_in_a_line(
    cbmir: Cbmir, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(lake: Lake) -> None:
        raise OSError(number, "No luck", "/data/lake")

    monkeypatch.setattr(Lake, "verify", lambda lake, model=None: fail(lake))
    status, out, err = cbmir("verify")
    assert (status, out) == (1, "")
    assert err.startswith("cbmir: /data/lake: No luck: ") and remedy in err and err.count("\n") == 1


def test_an_interrupt_ends_in_a_line(cbmir: Cbmir, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(lake: Lake, model: str | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Lake, "verify", interrupt)
    assert cbmir("verify") == (130, "", "cbmir: interrupted; run the same command again to continue\n")
