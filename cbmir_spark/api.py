"""The Python API: a lake that notebooks, scripts and the command line work with.

    import cbmir_spark as cbmir

    lake = cbmir.open("lake")
    lake.ingest("archive")
    lake.train(preset="retrieval")
    lake.index()
    answer = lake.search(["1f0c…"], k=10)
    answer.hits.show()

Every call runs one job on the driver and opens the lake again, so that it sees what is published by then. Failures
raise one of `cbmir_spark.errors`, whose message says what to do.
"""

import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cbmir_spark import config, extras, log, storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import InputError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from cbmir_spark.evaluation.job import Report as EvaluationReport
    from cbmir_spark.index.job import Report as IndexReport
    from cbmir_spark.index.open import Index
    from cbmir_spark.index.verify import Checked
    from cbmir_spark.ingest.job import Report as IngestReport
    from cbmir_spark.ingest.progress import Progress
    from cbmir_spark.lake.open import OpenLake
    from cbmir_spark.maintenance.forget import Report as ForgetReport
    from cbmir_spark.maintenance.remap import Gaps
    from cbmir_spark.maintenance.remap import Report as RemapReport
    from cbmir_spark.maintenance.upgrade import Report as UpgradeReport
    from cbmir_spark.models.registry import Run
    from cbmir_spark.retrieval.job import Report as SearchReport
    from cbmir_spark.training.history import Epoch
    from cbmir_spark.training.job import TrainingReport


def open(
    lake: str | os.PathLike[str] | None = None,
    *,
    spark: "SparkSession | None" = None,
    settings_file: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> "Lake":
    """Open a lake: a folder or an `s3a:` prefix; what `lake.uri` of the settings names if left out.

    `settings` are those of conf/base.yaml, a mapping per section or by dotted name: `ingest={"max_minutes": 60}` or
    `**{"ingest.max_minutes": 60}`; they come after `settings_file` and the environment. With `spark`, or where this
    process runs Spark already, the lake works in a new session of that context, and the settings of existing sessions
    stay as they are; else a session is built on first use. Nothing is read or written before the first call. Raises
    ConfigError for a setting that does not exist or a value that does not fit.
    """
    chosen = config.load(_path("settings_file", settings_file))
    if lake is not None:
        chosen = chosen.override({"lake.uri": _path("lake", lake)})
    return Lake(chosen.override(settings), spark)


class Answer:
    """The answer to a query list: hits, statuses and queries as they lie in the results folder.

    In a notebook it shows its gallery.
    """

    def __init__(self, report: "SearchReport", spark: "SparkSession", settings: Settings) -> None:
        self.report = report
        self._spark = spark
        self._store = storage.ObjectStore(settings.storage)

    @property
    def hits(self) -> "DataFrame":
        """Hits by query and rank, with distance, ids and tags."""
        return self._table("hits")

    @property
    def statuses(self) -> "DataFrame":
        """One row per query: status, reason, partitions searched, rows compared and number of hits."""
        return self._table("statuses")

    @property
    def queries(self) -> "DataFrame":
        """What the queries were: their image, series, study and patient ids."""
        return self._table("queries")

    def gallery(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the URI of the HTML gallery; with `path`, of a copy there.

        Raises InputError where the search was asked for none (`retrieval.gallery` 0).
        """
        if self.report.gallery is None:
            raise InputError("the search made no gallery: set gallery to the number of queries to show")
        if path is None:
            return self.report.gallery
        target = storage.canonical(os.fspath(path))
        self._store.write_bytes(target, self._store.read_bytes(self.report.gallery))
        return target

    def _table(self, name: str) -> "DataFrame":
        from cbmir_spark.lake import schemas

        tables = {
            "hits": schemas.RESULTS_HITS,
            "statuses": schemas.RESULTS_STATUSES,
            "queries": schemas.RESULTS_QUERIES,
        }
        return self._spark.read.schema(tables[name].schema).parquet(storage.join(self.report.out, name))

    def __repr__(self) -> str:
        report = self.report
        return (
            f"<Answer to {report.queries} queries: {report.answered} answered, {report.empty} without candidates, "
            f"{report.failed} failed; in {report.out}>"
        )

    def _repr_html_(self) -> str:
        if self.report.gallery is None:
            return f"<code>{html.escape(repr(self))}</code>"
        page = self._store.read_bytes(self.report.gallery).decode("utf-8")
        # The page has styles of its own, which must not reach the notebook.
        return (
            f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts" '
            'style="width: 100%; height: 640px; border: 0"></iframe>'
        )


class Lake:
    """A lake and the settings to work on it with; see `open`. Usable as a context manager that ends its session."""

    def __init__(self, settings: Settings, spark: "SparkSession | None" = None) -> None:
        self.settings = settings
        self._given = spark
        self._session: SparkSession | None = None
        self._owns_session = False

    @property
    def uri(self) -> str:
        """The lake's canonical URI."""
        return storage.canonical(self.settings.lake.uri)

    @property
    def spark(self) -> "SparkSession":
        """The session that the jobs run in; built on first use."""
        return self._spark("notebook")

    def close(self) -> None:
        """Stop the Spark session, if this lake built it; a later call builds another."""
        session, self._session = self._session, None
        if session is not None and self._owns_session:
            # Where its Java process is gone there is nothing left to stop.
            with suppress(ConnectionError):
                # Jobs that an interrupt left behind are cancelled, of which Java would print pages.
                session.sparkContext.setLogLevel("OFF")
                session.stop()

    def __enter__(self) -> "Lake":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Lake {self.uri}>"

    # --- jobs, in the order of the path ---

    def ingest(
        self,
        archive: str | os.PathLike[str] | None = None,
        *,
        on_progress: "Progress | None" = None,
        **settings: Any,
    ) -> "IngestReport":
        """Read new and changed objects of an archive into SOURCES, TAGS and PIXELS; `settings` of section `ingest`."""
        from cbmir_spark.ingest import job

        chosen = self._with("ingest", settings, archive=_path("archive", archive))
        job.check(chosen)
        with self._job("ingest") as spark:
            return job.run(spark, chosen, on_progress)

    def train(
        self,
        preset: str | None = None,
        *,
        on_epoch: "Callable[[Epoch], None]" = lambda epoch: None,
        **settings: Any,
    ) -> "TrainingReport":
        """Train the network on the lake's labels; the new version becomes `candidate` if it is good enough.

        `settings` are those of section `training`, others by dotted name.
        """
        extras.require(extras.TRAIN, "train")
        from cbmir_spark.training import job

        chosen = self._with("training", settings, preset=preset)
        job.check(chosen)
        with self._job("train") as spark:
            return job.run(spark, chosen, on_epoch)

    def sweep(
        self,
        trainings: Sequence[Mapping[str, Any]],
        name: str = "sweep",
        *,
        on_run: Callable[[int], None] = lambda done: None,
    ) -> "list[TrainingReport]":
        """Train once for each mapping of settings (by dotted name), as runs nested in one MLflow run called `name`."""
        extras.require(extras.TRAIN, "train")
        from cbmir_spark.training import job

        if not trainings or not all(isinstance(changes, Mapping) for changes in trainings):
            raise InputError("the sweep must be a list with a mapping of settings for each training")
        variants = [self.settings.override(changes) for changes in trainings]
        for variant in variants:
            job.check(variant)
        with self._job("train") as spark:
            return job.sweep(spark, variants, name, on_run)

    def index(self, model: str | None = None, **settings: Any) -> "IndexReport":
        """Embed the frames that the model's FEATURES table lacks; a verified index becomes `champion`.

        `model` is models:/name@alias, models:/name/3, runs:/id or a folder; the candidate if left out. `settings` are
        those of section `index`.
        """
        extras.require(extras.EMBED, "index")
        from cbmir_spark.index import job

        chosen = self._with("index", settings, model=model)
        with self._job("index") as spark:
            return job.run(spark, chosen)

    def search(self, queries: Any = None, **settings: Any) -> Answer:
        """Find the nearest images, or series, of each query.

        `queries` may be the path of a query list (CSV or Parquet), a pandas, Spark or Arrow table with its columns, a
        list of `Query`, of image ids or of paths of .dcm files, or an (n, D) array of vectors of the index's model.
        `settings` are those of section `retrieval`: k, prefilter, level, model, out, csv, … Raises InputError for
        queries that cannot be used as a whole; a single bad query gets a status that says why.
        """
        from cbmir_spark.retrieval import job, query_sources

        chosen = self._with("retrieval", settings)
        asked = query_sources.from_any(queries, chosen.retrieval.level)
        if isinstance(asked, str):
            chosen, asked = chosen.override({"retrieval.queries": asked}), None
        asked = job.check(chosen, asked)
        if asked.folders:
            # Whoever lists files in code may read them; a query list that others wrote is bound to `retrieval.roots`.
            chosen = chosen.override({"retrieval.roots": [*chosen.retrieval.roots, *asked.folders]})
        with self._job("retrieve") as spark:
            return Answer(job.run(spark, chosen, asked), spark, chosen)

    def evaluate(self, model: str | None = None, out: str | None = None, **settings: Any) -> "EvaluationReport":
        """Measure classification and retrieval with the patients that training never saw.

        `model` is the one to evaluate, the champion if left out; `settings` are those of section `evaluation`.
        """
        extras.require(extras.EMBED, "evaluate")
        from cbmir_spark.evaluation import job

        chosen = self._with("evaluation", settings, out=out, **{"retrieval.model": model})
        with self._job("evaluate") as spark:
            return job.run(spark, chosen)

    def training_runs(self, limit: int = 20) -> "list[Run]":
        """List the newest training runs: settings, figures, and the state of the model; needs no Spark."""
        from cbmir_spark.models.registry import Registry

        if not isinstance(limit, int) or limit < 1:
            raise InputError(f"limit must be a whole number from 1, not {limit!r}")
        store = storage.ObjectStore(self.settings.storage)
        return Registry(self.settings.mlflow, self.uri, store).runs(limit)

    # --- upkeep ---

    def verify(self, model: str | None = None) -> "Checked":
        """Compare the whole index with the published frames, and check every vector; raises TableError for a fault."""
        from cbmir_spark.index import verify

        chosen = self._with("retrieval", {}, model=model)
        with self._job("verify") as spark:
            return verify.run(spark, chosen)

    def remap(self, **settings: Any) -> "RemapReport":
        """Apply a changed vocabulary to TAGS and FEATURES; `settings` are those of section `vocabulary`."""
        from cbmir_spark.maintenance import remap

        chosen = self._with("vocabulary", settings)
        with self._job("remap") as spark:
            return remap.run(spark, chosen)

    def unmapped(self, **settings: Any) -> "Gaps":
        """Count the lake's raw codes that the vocabulary has no term for."""
        from cbmir_spark.maintenance import remap

        chosen = self._with("vocabulary", settings)
        with self._job("vocabulary") as spark:
            return remap.unmapped(spark, chosen)

    def upgrade(self, *, apply: bool = False, skip: Sequence[str] = ()) -> "UpgradeReport":
        """Count the objects that this version reads in another way than the one that read them; `apply` marks them.

        The next ingest reads the marked ones again. `skip` names changes that concern nothing in this lake.
        """
        from cbmir_spark.maintenance import upgrade

        with self._job("upgrade") as spark:
            return upgrade.run(spark, self.settings, apply=apply, skip=_texts("skip", skip))

    def forget(
        self,
        *,
        patients: Sequence[str] = (),
        issuer: str | None = None,
        studies: Sequence[str] = (),
        series: Sequence[str] = (),
        images: Sequence[str] = (),
        pseudonyms: Sequence[str] = (),
        listed_in: str | os.PathLike[str] | None = None,
        now: bool = False,
        purge: bool = False,
    ) -> "ForgetReport":
        """Erase patients, studies, series or images everywhere; later ingests skip them.

        They are named by their identifiers, by `pseudonyms` as kind:pseudonym, or `listed_in` a CSV file with columns
        kind, identifier and, if needed, issuer. A patient whose images name an Issuer of Patient ID is another one than
        the patient of the same ID without: give the `issuer` of all `patients`. `now` also removes superseded files at
        once, which breaks running readers of them; `purge` removes those that were superseded a week ago.
        """
        from cbmir_spark.maintenance import forget

        named = {
            "patient": _texts("patients", patients),
            "study": _texts("studies", studies),
            "series": _texts("series", series),
            "image": _texts("images", images),
            forget.PSEUDONYM: _texts("pseudonyms", pseudonyms),
        }
        if issuer is not None and not named[forget.PATIENT]:
            raise InputError("issuer: give the patients that it belongs to")
        listed = _path("listed_in", listed_in)
        requests = [
            forget.Request(kind, value, issuer if kind == forget.PATIENT else None)
            for kind, values in named.items()
            for value in values
        ]
        if listed is not None:
            requests += forget.read_list(listed, storage.ObjectStore(self.settings.storage))
        with self._job("forget") as spark:
            return forget.run(spark, self.settings, requests, now=now, purge=purge)

    # --- tables, at the versions published when they are asked for ---

    @property
    def tags(self) -> "DataFrame":
        """TAGS: one row per SOP instance."""
        return self._opened().tags

    @property
    def pixels(self) -> "DataFrame":
        """PIXELS: one row per frame, 256×256 uint8."""
        return self._opened().pixels

    @property
    def sources(self) -> "DataFrame":
        """SOURCES: one row per object that was ever seen in the archive, from the vault."""
        return self._opened().sources

    @property
    def runs(self) -> "DataFrame":
        """RUNS: one row per job run."""
        from cbmir_spark.lake import delta, schemas
        from cbmir_spark.lake.paths import LakePaths

        with self._job("runs") as spark:
            return delta.read(spark, LakePaths.of(self.settings.lake).path(schemas.RUNS))

    def features(self, model: str | None = None) -> "DataFrame":
        """FEATURES of a model, the champion if left out: one row per frame, with its vector."""
        return self._index(model).rows

    def feature_files(self, model: str | None = None) -> tuple[str, list[str]]:
        """Return the folder of a model's FEATURES table and the URIs of its live Parquet files."""
        index = self._index(model)
        return index.path, list(index.files)

    def _index(self, model: str | None) -> "Index":
        from cbmir_spark.index.open import open_index
        from cbmir_spark.lake.open import open_lake
        from cbmir_spark.models.registry import Registry

        chosen = self._with("retrieval", {}, model=model)
        with self._job("features") as spark:
            lake = open_lake(spark, chosen)
            registry = Registry(chosen.mlflow, lake.paths.uri, lake.store)
            return open_index(lake, registry, chosen.retrieval.model)

    def _opened(self) -> "OpenLake":
        from cbmir_spark.lake.open import open_lake

        with self._job("open") as spark:
            return open_lake(spark, self.settings)

    # --- settings and session ---

    def _with(self, section: str, settings: Mapping[str, Any], **given: Any) -> Settings:
        """Override the lake's settings for one call: names of `section`'s settings, dotted names, or whole sections."""
        changes = {**settings, **{name: value for name, value in given.items() if value is not None}}
        fields = type(getattr(self.settings, section)).model_fields
        sections = type(self.settings).model_fields
        return self.settings.override(
            {
                name if "." in name or (name in sections and name not in fields) else f"{section}.{name}": value
                for name, value in changes.items()
            }
        )

    @contextmanager
    def _job(self, name: str) -> "Iterator[SparkSession]":
        from cbmir_spark.spark import failures

        spark = self._spark(name)
        with log.job(name), failures.translate_errors(spark, name):
            yield spark

    def _spark(self, job: str) -> "SparkSession":
        """Java and pyspark are looked for only when a job needs them."""
        from cbmir_spark.spark import session

        if self._session is None or session.is_stopped(self._session):
            running = self._given or session.running()
            self._owns_session = running is None
            self._session = session.adopt(running, self.settings) if running else session.build(self.settings, job)
        return self._session


def _path(name: str, path: str | os.PathLike[str] | None) -> str | None:
    if path is not None and not isinstance(path, str | os.PathLike):
        raise InputError(f"{name} must be a path or a URI, not {type(path).__name__}")
    return None if path is None else os.fspath(path)


def _texts(name: str, values: Sequence[str]) -> list[str]:
    """Check a list of identifiers: a single text would be taken for a list of its characters."""
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{name} must be a list of texts, such as {name}=['…']")
    return list(values)
