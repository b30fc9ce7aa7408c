"""Open a lake: pin the published versions and load the pseudonym key, once per job. Runs on the driver."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from pyspark.sql import DataFrame, SparkSession

from cbmir_spark import storage
from cbmir_spark.config import PrivacySettings, Settings
from cbmir_spark.errors import ConfigError, InputError, TableError
from cbmir_spark.lake import lease, pseudonyms, publication
from cbmir_spark.lake.delta import TableVersion
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.lake.pseudonyms import Pseudonyms
from cbmir_spark.lake.publication import Published
from cbmir_spark.lake.schemas import PIXELS, SOURCES, TAGS, Table
from cbmir_spark.storage import ObjectStore


@dataclass(frozen=True)
class OpenLake:
    """A lake as one job sees it. Constructing one does no I/O; `open_lake` looks up what goes in.

    `published` are the versions that belonged together when the lake was opened, None before the first ingest.
    `pseudonyms` is None where no key is configured and none is needed yet. `leases` are those that the job
    has acquired to write.
    """

    spark: SparkSession
    paths: LakePaths
    store: ObjectStore
    published: Published | None = None
    pseudonyms: Pseudonyms | None = None
    leases: tuple[lease.Lease, ...] = ()
    _opened: dict[tuple[str, int], TableVersion] = field(default_factory=dict, repr=False, compare=False)

    @property
    def versions(self) -> Published:
        """The published versions. Raises TableError where no image has been ingested."""
        if self.published is None or self.published.batch == 0:
            raise TableError(publication.no_images(self.paths))
        return self.published

    @property
    def names(self) -> Pseudonyms:
        """The lake's pseudonyms. Raises ConfigError where no key is configured."""
        if self.pseudonyms is None:
            raise ConfigError(pseudonyms.NO_KEY)
        return self.pseudonyms

    @property
    def tags(self) -> DataFrame:
        """TAGS at the published version. Raises TableError where no image has been ingested."""
        return self.table(TAGS, self.versions.tags).rows

    @property
    def pixels(self) -> DataFrame:
        """PIXELS at the published version. Raises TableError where no image has been ingested."""
        return self.table(PIXELS, self.versions.pixels).rows

    @property
    def sources(self) -> DataFrame:
        """SOURCES at the published version. Raises TableError where no image has been ingested."""
        return self.table(SOURCES, self.versions.sources).rows

    def table(self, table: Table, version: int) -> TableVersion:
        """Open a table at a version; each version is opened once, however often it is asked for."""
        path = self.paths.path(table)
        return self._opened.setdefault((path, version), TableVersion(self.spark, path, version))

    def at(self, published: Published) -> "OpenLake":
        """The same lake at other published versions; tables that it has opened stay open."""
        return replace(self, published=published)

    def check_leases(self) -> None:
        """Raise Busy where another job has taken one of the leases; call it right before a commit."""
        for each in self.leases:
            each.check()


def locate(settings: Settings) -> tuple[LakePaths, ObjectStore]:
    """Name the roots of the lake and the storage that holds them; looks at neither."""
    return LakePaths.of(settings.lake), ObjectStore(settings.storage)


def open_lake(spark: SparkSession, settings: Settings) -> OpenLake:
    """Open the lake that the settings name, at its published versions.

    Raises InputError where a file stands in its place, ConfigError where its key is missing, and TableError where the
    configured key is not the one that its pseudonyms were made with. Creates nothing.
    """
    paths, store = locate(settings)
    check_roots(paths, store)
    published = publication.published(spark, paths)
    return OpenLake(spark, paths, store, published, _pseudonyms(paths, settings.privacy, published))


@contextmanager
def open_for_writing(
    spark: SparkSession, settings: Settings, *leases: str, may_be_new: bool = False
) -> Iterator[OpenLake]:
    """Acquire the named leases of a lake for the duration of the block, and open it.

    Raises Busy where another job has one, TableError where the lake has no tables and `may_be_new` is false;
    otherwise as `open_lake`.
    """
    paths, store = locate(settings)
    check_roots(paths, store)
    # Before the leases, since taking one creates the vault's folder.
    if not may_be_new and not has_tables(paths, store):
        raise TableError(publication.no_images(paths))
    with ExitStack() as stack:
        acquired = tuple(stack.enter_context(lease.acquire(paths.vault, name, store)) for name in leases)
        published = publication.published(spark, paths)
        names = _pseudonyms(paths, settings.privacy, published)
        yield OpenLake(spark, paths, store, published, names, acquired)


def has_tables(paths: LakePaths, store: ObjectStore) -> bool:
    """Tell whether an ingest has created the lake's tables; needs no Spark."""
    return store.kind(storage.join(paths.path(SOURCES), "_delta_log")) == "folder"


def check_roots(paths: LakePaths, store: ObjectStore) -> None:
    """Raise InputError where a file stands in the place of the lake or its vault."""
    for root in (paths.uri, paths.vault):
        if store.kind(root) == "file":
            raise InputError(f"lake {root} is a file: give a folder or prefix, with --lake")


def _pseudonyms(paths: LakePaths, privacy: PrivacySettings, published: Published | None) -> Pseudonyms | None:
    """Load the key and check that it made the lake's pseudonyms; None if neither the settings nor a vault give one."""
    if not pseudonyms.is_configured(privacy) and (published is None or paths.vault_folder is None):
        return None
    names = pseudonyms.load(privacy, paths.vault_folder)
    rule = pseudonyms.patient_rule(privacy) if published is None else published.patients
    names = replace(names, patients=rule)
    if published is not None and names.key_id != published.key_id:
        raise TableError(
            f"lake {paths.uri} was made with pseudonym key {published.key_id}, the settings give {names.key_id}: "
            "give the lake's key, since another one would change every pseudonym"
        )
    return names
