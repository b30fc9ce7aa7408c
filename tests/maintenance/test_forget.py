"""After `forget` nothing of a patient is left on disk, all others are as before, and a killed run can be finished."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from cbmir_spark import config, storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError, TableError
from cbmir_spark.index import job as index_job
from cbmir_spark.index.layout import FEATURES
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, identity, pseudonyms, publication, schemas
from cbmir_spark.lake.open import open_lake
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.pseudonyms import Patient, PatientRule, Pseudonyms
from cbmir_spark.maintenance import erase_files, forget
from cbmir_spark.maintenance.forget import Request
from cbmir_spark.retrieval import job as retrieval_job
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import loader as training_loader
from cbmir_spark.training import snapshot_files
from cbmir_spark.training.manifest import MANIFEST, SPLITS, TEST, TRAIN, Snapshot
from cbmir_spark.training.snapshot import write_snapshot
from tests.support.kills import Killed, dying
from tests.support.leaks import contents
from tests.support.models import save_model
from tests.support.tiny_lake import PREPROCESSING, Drawn, draw, identifiers, owners, publish

pytestmark = pytest.mark.slow

PATIENT = "PATIENT-7531"
IMAGES = [
    Drawn(f"1.2.{patient}.{number}", PATIENT if patient == 3 else f"PATIENT-{patient}", *place)
    for patient in range(6)
    for number, place in enumerate([("CT", "CHEST"), ("CT", "CHEST"), ("MR", "HEAD")])
]
FORGOTTEN = [image for image in IMAGES if image.patient == PATIENT]


def _settings(lake: Path, *overrides: str) -> Settings:
    return config.load(
        overrides=[
            f"lake.uri={lake}",
            f"index.model={lake.parent / 'model'}",
            f"retrieval.model={lake.parent / 'model'}",
            f"retrieval.queries={lake.parent / 'queries.csv'}",
            "retrieval.prefilter=none",
            "dataset.min_images=2",
            "dataset.rows_per_group=2",
            # Of so few patients a smaller share may be nobody.
            "dataset.test_fraction=0.3",
            "dataset.validation_fraction=0",
            *overrides,
        ],
        environ={},
    )


def _names(settings: Settings) -> Pseudonyms:
    return pseudonyms.load(settings.privacy, LakePaths.of(settings.lake).vault_folder)


@pytest.fixture(scope="module")
def prepared(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake with two models' indexes, a training snapshot, an unfinished one, answers with a gallery, identities."""
    folder = tmp_path_factory.mktemp("erasure")
    settings = _settings(folder / "lake")
    names = pseudonyms.create(settings.privacy, LakePaths.of(settings.lake).vault_folder)
    lake = publish(spark, settings, IMAGES, names=names)
    texts = [item for image in IMAGES for item in identifiers(image).items()]
    known = [(kind, names.of_kind(kind, text), text, None, names.key_id) for kind, text in texts]
    assert identity.merge_identities(spark, lake, spark.createDataFrame(known, schemas.IDENTITY.schema)) == len(
        set(known)
    )
    assert identity.merge_identities(spark, lake, spark.createDataFrame(known, schemas.IDENTITY.schema)) == 0
    save_model(folder / "model", preprocessing=PREPROCESSING)
    indexed = index_job.run(spark, settings)
    other = lake.features("other-model")
    delta.ensure(spark, FEATURES, other)
    delta.append(delta.read(spark, indexed.table), FEATURES, other)
    snapshot = write_snapshot(open_lake(spark, settings), settings.dataset)
    unfinished = Path(storage.local_path(lake.snapshots)) / "unfinished"
    shutil.copytree(storage.local_path(snapshot.uri), unfinished)
    (unfinished / MANIFEST).unlink()
    stopped = Path(storage.local_path(lake.checkpoints)) / "stopped"
    stopped.mkdir(parents=True)
    (stopped / "000000000200-0.safetensors").write_bytes(b"what was learned so far")
    asked = [FORGOTTEN[0], IMAGES[0], IMAGES[-1]]
    lines = [f"q{number},{owners(image, names)[cols.IMAGE_ID]}" for number, image in enumerate(asked)]
    (folder / "queries.csv").write_text("\n".join(["query_id,image_id", *lines]))
    retrieval_job.run(spark, settings)
    (folder / "lake" / "vault" / "staging").mkdir()
    (folder / "lake" / "vault" / "staging" / "left by a killed ingest").write_text(PATIENT)
    Path(storage.local_path(lake.unlisted)).write_text(f"folder,cause\nfile:///archive/{PATIENT},Permission denied\n")
    return folder


def _copied(prepared: Path, folder: Path) -> Settings:
    shutil.copytree(prepared / "lake", folder / "lake")
    shutil.copytree(prepared / "model", folder / "model")
    shutil.copy(prepared / "queries.csv", folder)
    return _settings(folder / "lake")


def _snapshot(lake: LakePaths) -> Snapshot:
    (manifest,) = Path(storage.local_path(lake.snapshots)).glob(f"*/{MANIFEST}")
    return Snapshot.from_json(manifest.read_bytes(), storage.canonical(str(manifest.parent)))


def _rows(spark: SparkSession, lake: LakePaths) -> dict[str, list[str]]:
    """The live rows of everything that holds images."""
    pinned = publication.require_published(spark, lake)
    at = [
        (schemas.TAGS, pinned.tags),
        (schemas.PIXELS, pinned.pixels),
        (schemas.SOURCES, pinned.sources),
        (schemas.IDENTITY, None),
    ]
    frames = {table.name: delta.read(spark, lake.path(table), version) for table, version in at}
    for folder in Path(storage.local_path(lake.uri), "features").iterdir():
        frames[folder.name] = delta.read(spark, str(folder))
    (answers,) = Path(storage.local_path(lake.uri), "results").iterdir()
    for table in (schemas.RESULTS_HITS, schemas.RESULTS_STATUSES, schemas.RESULTS_QUERIES):
        frames[table.name] = spark.read.parquet(str(answers / table.name))
    found = {name: [repr(row.asDict()) for row in frame.collect()] for name, frame in frames.items()}
    snapshot = _snapshot(lake)
    for split in SPLITS:
        files = [Path(storage.local_path(snapshot.uri)) / file.path for file in snapshot.files[split]]
        found[split] = [repr(row) for file in files for row in pq.read_table(file).to_pylist()]
    return {name: sorted(rows) for name, rows in found.items()}


def _secrets(names: Pseudonyms) -> list[bytes]:
    """Everything that could identify the forgotten patient."""
    texts = {text for image in FORGOTTEN for text in identifiers(image).values() if " " not in text}
    texts |= {pseudonym for image in FORGOTTEN for pseudonym in owners(image, names).values()}
    texts |= {hashlib.sha256(draw(image, 0).tobytes()).hexdigest() for image in FORGOTTEN}
    return [text.encode() for text in sorted(texts)] + [draw(image, 0).tobytes()[2000:2040] for image in FORGOTTEN]


def _leaks(folder: Path, names: Pseudonyms) -> set[str]:
    secrets = _secrets(names)
    # The name of the object stays in SOURCES, or ingest would have to read it again every night.
    uris = [f"file:///archive/{image.name}.dcm".encode() for image in FORGOTTEN]
    found = set()
    for name, content in contents(folder):
        for uri in uris:
            content = content.replace(uri, b"")
        if any(secret in content for secret in secrets):
            found.add(name)
    return found


def _without(rows: dict[str, list[str]], names: Pseudonyms) -> dict[str, list[str]]:
    """Rows that are not of the forgotten patient, by the ids in their text."""
    ids = [pseudonym for image in FORGOTTEN for pseudonym in owners(image, names).values()]
    return {name: [row for row in each if not any(known in row for known in ids)] for name, each in rows.items()}


def test_a_forgotten_patient_leaves_no_byte_and_nobody_else_loses_a_row(
    spark: SparkSession, prepared: Path, tmp_path: Path
) -> None:
    settings = _copied(prepared, tmp_path)
    lake, names = LakePaths.of(settings.lake), _names(settings)
    before = _rows(spark, lake)
    assert len(_leaks(tmp_path / "lake", names)) > 20
    report = forget.run(spark, settings, [Request("patient", PATIENT), Request("study", "1.2.3.999")], now=True)
    assert (report.asked, report.unknown, report.tombstones, report.images) == (2, 1, 2, 3)
    removed = {name: each.rows for name, each in report.places.items()}
    hits = sum(any(owners(i, names)[cols.IMAGE_ID] in row for i in FORGOTTEN) for row in before["hits"])
    assert {name: removed[name] for name in ("tags", "pixels", "sources", "features", "snapshots", "identity")} == {
        "tags": 3,
        "pixels": 3,
        "sources": 3,
        "features": 6,
        "snapshots": 3,
        "identity": 3 + 3 + 1 + 1,
    }
    assert report.places["checkpoints"].files == 1
    assert not (Path(storage.local_path(lake.checkpoints)) / "stopped").exists()
    assert removed["results"] > hits > 0 and report.places["pages"].files == 1

    leaks = _leaks(tmp_path / "lake", names)
    assert {name.split("/")[1] for name in leaks} == {"forgotten"}, leaks
    after = _rows(spark, lake)
    others = _without(before, names)
    tombs = [row for row in after["sources"] if "FORGOTTEN" in row]
    assert len(tombs) == 3 and all("'digest': None" in row and "'image_id': None" in row for row in tombs)
    after["sources"] = [row for row in after["sources"] if row not in tombs]
    # What the query of a forgotten image found goes with the query.
    for name in ("hits", "statuses", "queries"):
        others[name] = [row for row in others[name] if "'q0'" not in row]
    assert after == others

    snapshot = _snapshot(lake)
    assert sum(sum(counts.values()) for counts in snapshot.images.values()) == len(IMAGES) - 3
    assert sum(snapshot.patients.values()) == 5
    for split in (TRAIN, TEST):
        loader = training_loader.Loader(snapshot, split, ObjectStore(settings.storage), batch_size=4, seed=1)
        assert sum(len(targets) for _, targets in loader.epoch(1)) == snapshot.rows(split)
    page = next(Path(storage.local_path(lake.uri)).glob("results/*/gallery.html")).read_text()
    assert page == erase_files.NOTE

    (tmp_path / "again.csv").write_text(f"query_id,image_id\na,{owners(FORGOTTEN[0], names)[cols.IMAGE_ID]}\n")
    asked = _settings(
        tmp_path / "lake", f"retrieval.queries={tmp_path / 'again.csv'}", f"retrieval.out={tmp_path / 'again'}"
    )
    assert retrieval_job.run(spark, asked).statuses["not_found"] == 1
    # Forgotten once more, nothing is left to do, and no table gets a version.
    version = publication.require_published(spark, lake)
    again = forget.run(spark, settings, [Request("patient", f"{PATIENT} ")])
    assert (again.tombstones, again.images, again.vacuumed_hours) == (0, 0, None)
    assert not any(each.rows or each.files for each in again.places.values())
    assert publication.require_published(spark, lake) == version
    runs = [row["counts"] for row in delta.read(spark, lake.path(schemas.RUNS)).where("job = 'forget'").collect()]
    assert sorted(counts["images"] for counts in runs) == [0, 3]


@pytest.mark.parametrize("every", [pytest.param(4, id="ci"), pytest.param(1, id="soak", marks=pytest.mark.soak)])
def test_a_run_that_is_killed_anywhere_is_finished_by_the_next(
    spark: SparkSession, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    settings = _copied(prepared, tmp_path)
    lake, names = LakePaths.of(settings.lake), _names(settings)
    expected = _without(_rows(spark, lake), names)
    image = owners(FORGOTTEN[0], names)[cols.IMAGE_ID]
    steps: list[tuple[Any, str, int]] = [
        (ObjectStore, "write_bytes", 1),  # the snapshot's manifest
        (snapshot_files, "erase", 1),
        (erase_files, "drop_rows", 1),
        (delta, "delete_rows", 1),
        (delta, "delete_images", 1),
        (delta, "delete_images", 2),
        (publication, "publish", 1),
        (identity, "prune_identities", 1),
        (delta, "vacuum", 2),
        (identity, "merge_new", 1),
    ]
    # Only the first run gets the request; the others find its tombstone.
    requests = [Request("pseudonym", f"patient:{owners(FORGOTTEN[0], names)[cols.PATIENT_ID]}")]
    for owner, name, calls in steps[::every]:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, dying(getattr(owner, name), calls))
            with pytest.raises(Killed):
                forget.run(spark, settings, requests, now=True)
        requests = []
    assert image not in repr(delta.read(spark, lake.path(schemas.TAGS)).collect())
    forget.run(spark, settings, [], now=True)
    assert {name.split("/")[1] for name in _leaks(tmp_path / "lake", names)} == {"forgotten"}
    after = _rows(spark, lake)
    after["sources"] = [row for row in after["sources"] if "FORGOTTEN" not in row]
    for name in ("hits", "statuses", "queries"):
        expected[name] = [row for row in expected[name] if "'q0'" not in row]
    assert after == expected


def test_malformed_requests_are_refused_without_being_repeated(
    spark: SparkSession, prepared: Path, tmp_path: Path
) -> None:
    settings = _copied(prepared, tmp_path)
    listed = tmp_path / "list.csv"
    listed.write_text("kind,identifier\npatient,ID 1\n\npseudonym,image:" + "0a" * 16 + '\nstudy,"1.2,3"\n')
    found = forget.read_list(str(listed), ObjectStore(settings.storage))
    assert [(each.kind, each.value) for each in found] == [
        ("patient", "ID 1"),
        ("pseudonym", "image:" + "0a" * 16),
        ("study", "1.2,3"),
    ]
    assert "ID 1" not in repr(found)
    for text, message in [
        ("patient,SECRET\n", "first line"),
        ("", "first line"),
        ("kind,identifier\nperson,SECRET\n", "line 2"),
        ("kind,identifier\npatient,a\npatient,\n", "line 3"),
        ("kind,identifier\npatient,SECRET,x\n", "line 2"),
    ]:
        listed.write_text(text)
        with pytest.raises(InputError, match=message) as refused:
            forget.read_list(str(listed), ObjectStore(settings.storage))
        assert "SECRET" not in str(refused.value)
    lake = LakePaths.of(settings.lake)
    for request, message in [
        (Request("patient", " \0"), "--patient: the identifier is empty"),
        (Request("pseudonym", "SECRET"), "--pseudonym: give"),
        (Request("pseudonym", "person:" + "0a" * 16), "--pseudonym: give"),
    ]:
        with pytest.raises(InputError, match=message) as refused:
            forget.run(spark, settings, [request])
        assert "SECRET" not in str(refused.value)
    with pytest.raises(InputError, match="nothing to forget"):
        forget.run(spark, settings, [])
    (tmp_path / "key").write_text("another key, just as long")
    other = _settings(tmp_path / "lake", f"privacy.key_file={tmp_path / 'key'}")
    with pytest.raises(TableError, match="pseudonym key"):
        forget.run(spark, other, [Request("patient", PATIENT)])
    assert identity.tombstones(spark, lake) == {}


def test_a_tombstone_may_come_before_the_first_image(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="holds no images yet"):
        forget.run(spark, _settings(tmp_path / "lake"), [Request("patient", PATIENT)])
    assert not list(tmp_path.iterdir())
    (tmp_path / "key").write_text("a key from before the first image")
    settings = _settings(tmp_path / "lake", f"privacy.key_file={tmp_path / 'key'}")
    report = forget.run(spark, settings, [Request("patient", PATIENT)], purge=True)
    assert (report.unknown, report.tombstones, report.images, report.vacuumed_hours) == (1, 1, 0, 168)
    assert report.matched_nothing
    names = _names(settings)
    tombstones = identity.tombstones(spark, LakePaths.of(settings.lake))
    assert tombstones == {PatientRule.ISSUER: {f"patient:{names.patient(PATIENT)}"}}
    identities = pseudonyms.identities("1.2.3", None, None, Patient(PATIENT), names)
    assert pseudonyms.is_forgotten(identities, tombstones[PatientRule.ISSUER])
    other = pseudonyms.identities("1.2.3", None, None, Patient("someone else"), names)
    assert not pseudonyms.is_forgotten(other, tombstones[PatientRule.ISSUER])
