"""`make bench`: ingest beside a plain multi-process loop, and the cost of a night by the size of the archive.

Results go to results.json here, with their input and machine; they are for comparing on one machine, never a test.
"""

import argparse
import hashlib
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pydicom.data import get_testdata_file, get_testdata_files
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from cbmir_spark import config, storage
from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.read import NotAnImage, Rejected, read_instance
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.ingest import job as ingest_job
from cbmir_spark.ingest import listing as ingest_listing
from cbmir_spark.ingest import parse
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.spark import session
from cbmir_spark.storage import ObjectStore
from tests.benchmarks.common import SHARED, keep, tell

CORES = 2
MOST_FRAMES = 4


def copies(content: bytes, uid: bytes, number: int) -> Iterator[bytes]:
    """The same file over and over, each as an instance of its own: a UID of the same length in the place of its own."""
    for copy in range(number):
        digits = str(int(hashlib.sha256(uid + str(copy).encode()).hexdigest(), 16))
        yield content.replace(uid, f"2.25.{digits}"[: len(uid)].encode())


def real_files() -> list[Path]:
    """The shared real files where they are, pydicom's own otherwise."""
    if (SHARED / "dicom").is_dir():
        return sorted(path for path in (SHARED / "dicom").rglob("*") if path.is_file())
    return sorted(Path(path) for path in get_testdata_files("*.dcm"))


def fill(folder: Path, objects: int, preprocessing: Preprocessing) -> dict[str, object]:
    """An archive of about so many images: copies of every real file that decodes to a few frames."""
    usable = []
    for path in real_files():
        content = path.read_bytes()
        try:
            instance = read_instance(content, preprocessing, Vocabulary())
        except (NotAnImage, Rejected):
            continue
        uid = instance.tags.sop_instance_uid.encode()
        if len(instance.frames) <= MOST_FRAMES and len(uid) > 20 and content.count(uid):
            usable.append((content, uid))
    size = written = 0
    for number, (content, uid) in enumerate(usable):
        for copy, changed in enumerate(copies(content, uid, max(1, objects // len(usable)))):
            path = folder / f"{copy:04}" / f"{number}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(changed)
            size += len(changed)
            written += 1
    return {"files": len(usable), "objects": written, "megabytes": round(size / 2**20)}


_READ: dict[str, Any] = {}


def _read(path: str) -> int:
    try:
        with open(path, "rb") as handle:
            return len(read_instance(handle.read(), _READ["preprocessing"], _READ["vocabulary"]).frames)
    except (NotAnImage, Rejected):
        return 0


def plain_loop(folder: Path, preprocessing: Preprocessing) -> tuple[float, int]:
    """Seconds and frames of the alternative: a pool of processes that read, decode and resize, and keep nothing."""
    _READ.update(preprocessing=preprocessing, vocabulary=Vocabulary())
    paths = sorted(str(path) for path in folder.rglob("*.dcm"))
    with get_context("fork").Pool(CORES) as pool:
        pool.map(_read, paths[: 4 * CORES])
        began = time.perf_counter()
        frames = sum(pool.imap_unordered(_read, paths, chunksize=16))
        return time.perf_counter() - began, frames


def settings_of(folder: Path, name: str, *more: str) -> config.Settings:
    overrides = [f"lake.uri={folder / name}", f"spark.master=local[{CORES}]", f"ingest.archive={folder / 'archive'}"]
    return config.load(overrides=[*overrides, *more], environ={})


def throughput(folder: Path, objects: int, rounds: int) -> dict[str, object]:
    """Images a second of the job and of the loop, in turn; the job's first run is in a session that has just begun."""
    settings = settings_of(folder, "lake")
    preprocessing = parse.preprocessing_of(settings.pixels)
    held = fill(folder / "archive", objects, preprocessing)
    spark = session.build(settings, "bench")
    runs = []
    for number in range(rounds):
        seconds, frames = plain_loop(folder / "archive", preprocessing)
        began = time.perf_counter()
        report = ingest_job.run(spark, settings_of(folder, f"lake-{number}"))
        ours = time.perf_counter() - began
        assert report.read == report.listed
        shutil.rmtree(folder / f"lake-{number}")
        stages = {name: round(value, 2) for name, value in report.seconds.items()}
        runs.append({"loop": round(seconds, 2), "job": round(ours, 2), "ratio": round(seconds / ours, 3)} | stages)
        tell(f"loop {seconds:.1f} s, job {ours:.1f} s, ratio {seconds / ours:.2f}: {stages}")
    spark.stop()
    loop = statistics.median(run["loop"] for run in runs)
    later = statistics.median(run["ratio"] for run in runs[1:] or runs)
    return {
        "input": held | {"frames": frames},
        "loop images/s": round(frames / loop, 1),
        "ratio, first run of a session": runs[0]["ratio"],
        "ratio, median of later runs": later,
        "runs": runs,
    }


def by_size(folder: Path, sizes: list[int], new: int) -> list[dict[str, object]]:
    """Stages of a night with `new` new objects beside ever more known ones, SOURCES seeded with those."""
    found = []
    template = Path(str(get_testdata_file("CT_small.dcm"))).read_bytes()
    uid = b"1.3.6.1.4.1.5962.1.1.1.1.1.20040119072730.12322"
    settings = settings_of(folder, "lake")
    spark = session.build(settings, "bench")
    root = folder / "archive"
    written = 0
    for known in sizes:
        for number in range(written, known):
            if number % 1000 == 0:
                (root / "known" / f"{number // 1000}").mkdir(parents=True, exist_ok=True)
            (root / "known" / f"{number // 1000}" / f"{number % 1000}").touch()
        written = known
        shutil.rmtree(root / "new", ignore_errors=True)
        settings = settings_of(folder, f"lake-{known}")
        seed(spark, settings)
        for copy, changed in enumerate(copies(template, uid, new)):
            path = root / "new" / f"{copy}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(changed)
        report = ingest_job.run(spark, settings)
        assert (report.read, report.unchanged) == (new, known)
        lake = LakePaths.of(settings.lake)
        compare = report.seconds["list"] + report.seconds["compare"]
        found.append(
            {
                "known": known,
                "new": new,
                "list and compare, s": round(compare, 2),
                "per million known, s": round(compare / known * 1e6, 1),
                "TAGS bytes": _bytes_of(settings, lake.path(schemas.TAGS)),
                "PIXELS bytes": _bytes_of(settings, lake.path(schemas.PIXELS)),
                "stages": {name: round(value, 2) for name, value in report.seconds.items()},
            }
        )
        tell(str(found[-1]))
    spark.stop()
    return found


def _bytes_of(settings: config.Settings, uri: str) -> int:
    return sum(found.size for found in ObjectStore(settings.storage).list_objects(uri))


def seed(spark: SparkSession, settings: config.Settings) -> None:
    """A lake whose SOURCES knows every object of the archive as ingested, though TAGS and PIXELS are empty."""
    (Path(settings.ingest.archive or "") / "empty").mkdir(exist_ok=True)
    nothing = settings.override({"ingest.archive": f"{settings.ingest.archive}/empty"})
    ingest_job.run(spark, nothing)
    lake = LakePaths.of(settings.lake)
    pinned = publication.published(spark, lake)
    assert pinned is not None
    listing = ingest_listing.list_archive(
        spark, storage.canonical(str(settings.ingest.archive)), ObjectStore(settings.storage)
    )
    identity = F.sha2(cols.URI, 256)
    rows = listing.select(
        *ingest_listing.LISTING.names,
        identity.alias(cols.DIGEST),
        F.lit(cols.INGESTED).alias(cols.OUTCOME),
        F.lit(None).cast("string").alias(cols.REASON),
        F.substring(identity, 1, 32).alias(cols.IMAGE_ID),
        F.lit(pinned.key_id).alias(cols.KEY_ID),
        F.lit(0).cast("bigint").alias(cols.BATCH),
    )
    publication.publish(spark, lake, rows, pinned, only_new=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--new", type=int, default=1_000)
    parser.add_argument("--only", choices=["throughput", "size"])
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="cbmir-bench-") as name:
        if asked.only != "size":
            keep("ingest beside a plain loop", throughput(Path(name) / "a", asked.objects, asked.rounds))
        if asked.only != "throughput":
            keep("a night by the size of the archive", {"nights": by_size(Path(name) / "b", asked.sizes, asked.new)})


if __name__ == "__main__":
    main()
