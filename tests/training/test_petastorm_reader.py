"""Petastorm's reader on any pyarrow gives what it gives, unmodified, on the pyarrow that it was written for."""

import errno
import importlib.metadata
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import s3fs

from cbmir_spark import extras, storage
from cbmir_spark.config import StorageSettings
from cbmir_spark.errors import EnvironmentProblem, TrainingError
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import petastorm_reader
from cbmir_spark.training.petastorm_reader import Files, open_reader
from tests.conftest import REPO
from tests.support import petastorm_orders
from tests.support.s3_server import S3Server

ROWS = sum(map(sum, petastorm_orders.FILES))
GROUPS = sum(map(len, petastorm_orders.FILES))
RECORD = REPO / "tests" / "data" / "petastorm_orders.json"
LOCAL = StorageSettings(endpoint=None, region="us-east-1", path_style=True, attempts=8)
# The last version with the classes that Petastorm is written for.
OLD_PYARROW = int(pa.__version__.partition(".")[0]) <= 14


def recorded() -> dict[str, list[int]]:
    return json.loads(RECORD.read_text())  # type: ignore[no-any-return]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], cwd=REPO, capture_output=True, text=True
    )


@pytest.mark.skipif(not OLD_PYARROW, reason="unmodified, Petastorm cannot be imported with a pyarrow after 14")
def test_the_record_is_what_the_unmodified_petastorm_gives() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.petastorm_orders"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == recorded()


@pytest.mark.parametrize("name", ["plain", "with #, ? and %20 in it"])
def test_rows_order_and_shards_are_those_of_the_unmodified_petastorm(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    uris = [storage.canonical(str(path)) for path in petastorm_orders.write(folder)]
    files = Files(uris, ObjectStore(LOCAL))
    assert petastorm_orders.orders(lambda **options: open_reader(files, **options)) == recorded()


def test_from_object_storage_they_are_the_same(s3: S3Server) -> None:
    bucket = s3.bucket("orders")
    uris = [f"s3a://{bucket.name}/{path.name}" for path in petastorm_orders.write(bucket)]
    store = ObjectStore(StorageSettings(endpoint=s3.endpoint, region="us-east-1", path_style=True, attempts=3))
    assert petastorm_orders.orders(lambda **options: open_reader(Files(uris, store), **options)) == recorded()


def test_nothing_changes_outside_of_petastorm(tmp_path: Path) -> None:
    """In a fresh process, where two threads at once open the first readers."""
    petastorm_orders.write(tmp_path)
    code = """
import sys, threading, warnings
from pathlib import Path
import numpy, pyarrow, pyarrow.parquet
from cbmir_spark import storage
from cbmir_spark.config import StorageSettings
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training.petastorm_reader import Files, open_reader
from tests.support import petastorm_orders
store = ObjectStore(StorageSettings(endpoint=None, region="us-east-1", path_style=True, attempts=1))
before = {each.__name__: dict(vars(each)) for each in (numpy, pyarrow, pyarrow.parquet)}
stubs = ("pyarrow.filesystem", "petastorm.hdfs.namenode")
modules = [sys.modules.get(name) for name in stubs]
filters = list(warnings.filters)
uris = sorted(storage.canonical(str(path)) for path in Path(sys.argv[1]).iterdir())
rows = []
def read():
    reader = open_reader(Files(uris, store), num_epochs=1, shuffle_row_groups=False, workers_count=1)
    rows.append(petastorm_orders.read(reader, int(sys.argv[2])) == list(range(int(sys.argv[3]))))
threads = [threading.Thread(target=read) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
for each in (numpy, pyarrow, pyarrow.parquet):
    changed = {name for name, value in before[each.__name__].items() if vars(each).get(name) is not value}
    assert not changed, (each, changed)
assert [sys.modules.get(name) for name in stubs] == modules
assert warnings.filters == filters
print(rows)
"""
    done = python(code, str(tmp_path), str(GROUPS), str(ROWS))
    assert (done.returncode, done.stdout) == (0, "[True, True]\n"), done.stderr


@pytest.mark.skipif(not OLD_PYARROW, reason="unmodified, Petastorm cannot be imported with a pyarrow after 14")
def test_readers_of_others_in_the_same_process_work_as_before(tmp_path: Path) -> None:
    petastorm_orders.write(tmp_path)
    code = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from petastorm import make_batch_reader
from cbmir_spark import storage
from cbmir_spark.config import StorageSettings
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training.petastorm_reader import Files, open_reader
from tests.support import petastorm_orders
store = ObjectStore(StorageSettings(endpoint=None, region="us-east-1", path_style=True, attempts=1))
folder = Path(sys.argv[1])
ours = open_reader(Files([storage.canonical(str(folder / "part-0.parquet"))], store), num_epochs=1, workers_count=1)
theirs = make_batch_reader(folder.as_uri(), num_epochs=1, workers_count=1)
print(len(petastorm_orders.read(theirs, int(sys.argv[2]))), len(petastorm_orders.read(ours, 2)))
"""
    done = python(code, str(tmp_path), str(GROUPS))
    assert (done.returncode, done.stdout) == (0, f"{ROWS} {sum(petastorm_orders.FILES[0])}\n"), done.stderr


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "petastorm.reader", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.14.0")
    with pytest.raises(EnvironmentProblem, match=r"petastorm 0\.14\.0 is .* pip install petastorm==0\.13\.1"):
        open_reader(Files([], ObjectStore(LOCAL)))


def test_a_footer_is_read_once_for_all_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    footers: list[str] = []
    original = petastorm_reader.File.footer

    def counted(file: petastorm_reader.File) -> Any:
        before = file._footer
        found = original(file)
        if before is None:
            footers.append(threading.current_thread().name)
        return found

    monkeypatch.setattr(petastorm_reader.File, "footer", counted)
    uris = [storage.canonical(str(path)) for path in petastorm_orders.write(tmp_path)]
    files = Files(uris, ObjectStore(LOCAL))
    for _ in range(2):
        reader = open_reader(files, num_epochs=1, workers_count=1)
        assert len(petastorm_orders.read(reader, GROUPS)) == ROWS
    assert len(footers) == len(petastorm_orders.FILES)


def test_object_storage_is_asked_for_a_footer_once_and_for_each_row_group_once(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.bucket("requests")
    uris = [f"s3a://{bucket.name}/{path.name}" for path in petastorm_orders.write(bucket)]
    store = ObjectStore(StorageSettings(endpoint=s3.endpoint, region="us-east-1", path_style=True, attempts=3))
    files = Files(uris, store)
    # fsspec's own, of this class: each holds connections and is never dropped, so threads must not add to it.
    systems: dict[str, object] = {}
    monkeypatch.setattr(s3fs.S3FileSystem, "_cache", systems)
    for _ in range(2):
        reader = open_reader(files, num_epochs=1, workers_count=1, schema_fields=list(petastorm_orders.COLUMNS))
        assert len(petastorm_orders.read(reader, GROUPS)) == ROWS
    assert s3.requests(bucket.name) == {"HeadObject": len(uris), "GetObject": len(uris) + 2 * GROUPS}
    assert len(systems) == 1


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _overwrite(file: Path) -> None:
    """Damage a row group, but not the footer."""
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\xff" * 500 + content[504:])


@pytest.mark.parametrize("damage", [_cut, _overwrite, Path.unlink], ids=["cut", "overwritten", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    paths = petastorm_orders.write(tmp_path)
    damage(paths[2])
    files = Files([storage.canonical(str(path)) for path in paths], ObjectStore(LOCAL))
    with pytest.raises(TrainingError, match=r"part-2\.parquet is missing or damaged: delete the snapshot"):
        petastorm_orders.read(open_reader(files, num_epochs=1, workers_count=1), GROUPS)


def test_a_missing_object_is_named(s3: S3Server) -> None:
    store = ObjectStore(StorageSettings(endpoint=s3.endpoint, region="us-east-1", path_style=True, attempts=3))
    bucket = s3.bucket("missing")
    with pytest.raises(TrainingError, match=r"s3a://missing/part-0\.parquet is missing or damaged"):
        open_reader(Files([f"s3a://{bucket.name}/part-0.parquet"], store))


def test_a_failure_that_is_not_of_the_file_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files([storage.canonical(str(path)) for path in petastorm_orders.write(tmp_path)], ObjectStore(LOCAL))

    def refuse(file: petastorm_reader.File) -> None:
        raise PermissionError(errno.EACCES, "refused")

    monkeypatch.setattr(petastorm_reader.File, "_input", refuse)
    with pytest.raises(PermissionError, match="refused"):
        open_reader(files)


def test_without_petastorm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "petastorm.reader", raising=False)
    monkeypatch.setattr(extras, "missing", lambda extra: ["petastorm"])
    with pytest.raises(
        EnvironmentProblem, match=r"petastorm, which is not installed: pip install 'cbmir-spark\[train\]'"
    ):
        open_reader(Files([], ObjectStore(LOCAL)))
