"""Damaged files, bombs and dying codecs through the real job: each costs itself, whatever lies beside it.

`make soak` runs the same tests with more of everything.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.dicom.decoder import Decoder
from cbmir_spark.dicom.read import NotAnImage, Reason, Rejected
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, schemas
from cbmir_spark.lake.paths import LakePaths
from tests.conftest import MakeSettings
from tests.support import codec_plugin, damaged, traps
from tests.support.dicom_files import PREPROCESSING, VOCABULARY, real

# pydicom warns about most of these files when they are built; nothing of ours does.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:pydicom"), pytest.mark.slow]

# reliability.md: what a worker and the process that decodes for it may take together.
MOST_BYTES = 5 * 2**29
GOOD = [
    "CT_small.dcm",
    "MR_small.dcm",
    "JPEG2000.dcm",
    "JPGExtended.dcm",
    "examples_palette.dcm",
    "examples_rgb_color.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "examples_overlay.dcm",
    "image_dfl.dcm",
    "693_J2KI.dcm",
    "SC_rgb_rle_16bit_2frame.dcm",
    "J2K_pixelrep_mismatch.dcm",
]


def _outcomes(spark: SparkSession, settings: config.Settings) -> dict[str, tuple[str, str | None]]:
    """Outcome and reason by file, below the archive. Fails where SOURCES has an object twice."""
    assert settings.ingest.archive is not None
    rows = (
        delta.read(spark, LakePaths.of(settings.lake).path(schemas.SOURCES))
        .select(cols.URI, cols.OUTCOME, cols.REASON)
        .collect()
    )
    found = {
        os.path.relpath(storage.local_path(row[cols.URI]), settings.ingest.archive): (
            row[cols.OUTCOME],
            row[cols.REASON],
        )
        for row in rows
    }
    assert len(found) == len(rows)
    return found


def _failed_tasks(spark: SparkSession) -> int:
    store = spark.sparkContext._jsc.sc().statusStore()
    executors = store.executorList(False)
    return sum(executors.apply(n).failedTasks() for n in range(executors.size()))


def _peak(pid: int) -> int:
    """Return the most bytes of memory that a process had; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _decoders() -> Iterator[tuple[int, int]]:
    """(process, its parent) of each process that decodes now."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if b"cbmir_spark.dicom.decoder" in (folder / "cmdline").read_bytes():
                    yield int(folder.name), int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue


@contextmanager
def _watched() -> Iterator[list[int]]:
    """Measure the most memory of a worker and its decoder, the sum of their peaks: the one element of the list."""
    most = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max([most[0], *(_peak(pid) + _peak(parent) for pid, parent in _decoders())])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


@pytest.mark.parametrize(
    ("mutants", "cuts"),
    [
        pytest.param(2_000, 300, id="ci"),
        pytest.param(20_000, 2_000, id="soak", marks=[pytest.mark.soak, pytest.mark.timeout(3_600)]),
    ],
)
def test_every_damaged_file_gets_one_outcome(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path, mutants: int, cuts: int
) -> None:
    archive = tmp_path / "archive"
    for number in range(max(mutants, cuts)):
        folder = archive / f"{number // 500:03}"
        folder.mkdir(parents=True, exist_ok=True)
        if number < mutants:
            (folder / f"mutant {number}.dcm").write_bytes(damaged.mutant(number))
        if number < cuts:
            (folder / f"cut {number}.dcm").write_bytes(damaged.cut(number)[1])
    settings = make_settings(f"ingest.archive={archive}")
    failed = _failed_tasks(spark)
    with _watched() as most:
        report = ingest_job.run(spark, settings)
    assert _failed_tasks(spark) == failed
    assert report.listed == mutants + cuts == sum(report.outcomes.values())
    outcomes = _outcomes(spark, settings)
    assert len(outcomes) == mutants + cuts
    # Past `decoder_seconds`, which is 20, an object is given up and called so: none hung.
    assert settings.ingest.decoder_seconds == 20.0
    assert report.reasons.get(Reason.TIMEOUT, 0) == 0
    assert report.reasons.get(Reason.INTERNAL, 0) <= mutants / 1000
    assert report.outcomes[cols.REJECTED] > mutants / 4
    standing = sum(report.outcomes.get(outcome, 0) for outcome in (cols.INGESTED, cols.DUPLICATE, cols.CONFLICT))
    assert standing > mutants / 20, "hardly a mutant was decoded: they do not reach the codecs"
    for number in range(cuts):
        outcome, reason = outcomes[f"{number // 500:03}/cut {number}.dcm"]
        if outcome not in (cols.REJECTED, cols.NOT_AN_IMAGE):
            whole, left = damaged.cut(number)
            assert damaged.has_all_pixels(whole, len(left)), f"cut {number} was {outcome} ({reason})"
    assert 0 < most[0] < MOST_BYTES, f"{most[0] / 2**20:.0f} MiB"


@pytest.mark.parametrize("cuts", [2_000, pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(1_200)])])
def test_a_file_that_lost_pixels_is_never_taken_for_whole(cuts: int) -> None:
    reasons = set()
    taken = 0
    with Decoder(PREPROCESSING, VOCABULARY, 2048, 20.0) as decoder:
        for number in range(cuts):
            whole, left = damaged.cut(number)
            try:
                decoder.read(left)
            except Rejected as error:
                reasons.add(error.reason)
            except NotAnImage as error:
                reasons.add(error.reason)
            else:
                assert damaged.has_all_pixels(whole, len(left)), f"cut {number}: {len(left)} of {len(whole)} bytes"
                taken += 1
    assert reasons <= {Reason.TRUNCATED, Reason.NO_PIXELS, Reason.NOT_IMAGE_CLASS}
    assert taken < cuts / 50


def test_the_oracle_of_cuts_on_cases_worked_by_hand() -> None:
    """CT_small.dcm ends in 32768 bytes of pixels and 138 of Data Set Trailing Padding."""
    content = real("CT_small.dcm")
    assert content[-138:-134] == b"\xfc\xff\xfc\xff"
    assert damaged.has_all_pixels(content, len(content) - 138)
    assert not damaged.has_all_pixels(content, len(content) - 139)
    # The delimiter of encapsulated pixel data has eight bytes.
    compressed = real("693_J2KI.dcm")
    assert damaged.has_all_pixels(compressed, len(compressed) - 8)
    assert not damaged.has_all_pixels(compressed, len(compressed) - 9)


def test_traps_cost_only_themselves(
    spark: SparkSession, make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bombs, lies and deaths of codecs among good files: each has its reason, and every good file is there."""
    codec = tmp_path / "codec"
    codec.mkdir()
    codec_plugin.install(codec)
    # Workers started from here on have the codec on their path, and hand it on to the processes that decode.
    monkeypatch.setitem(
        spark.sparkContext.environment,
        "PYTHONPATH",
        os.pathsep.join(filter(None, [str(codec), os.environ.get("PYTHONPATH")])),
    )
    archive = tmp_path / "archive"
    archive.mkdir()
    wanted = traps.traps() | traps.deaths()
    assert len(wanted) >= 40
    for name, trap in wanted.items():
        (archive / name).write_bytes(trap.content())
    for name in GOOD:
        (archive / name).write_bytes(real(name))
    settings = make_settings(
        f"ingest.archive={archive}",
        # Two processes of tests share the cores: the largest trap needs seconds even so, and two others use all of it.
        "ingest.decoder_seconds=12.0",
        "ingest.max_object_mb=100",
        "ingest.files_per_task=5",
    )
    failed = _failed_tasks(spark)
    with _watched() as most:
        report = ingest_job.run(spark, settings)
    assert _failed_tasks(spark) == failed
    outcomes = _outcomes(spark, settings)
    assert {name: outcomes[name] for name in GOOD} == dict.fromkeys(GOOD, (cols.INGESTED, None))
    wrong = {
        name: outcomes[name]
        for name, trap in wanted.items()
        if outcomes[name][0] != trap.outcome or outcomes[name][1] not in trap.reasons
    }
    assert wrong == {}
    assert report.listed == len(wanted) + len(GOOD) == sum(report.outcomes.values())
    assert 0 < most[0] < MOST_BYTES, f"{most[0] / 2**20:.0f} MiB"
