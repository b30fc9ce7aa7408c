"""`python -m tests.benchmarks.retrieval`: a search beside its alternatives, over the same vectors in the same files.

    python -m tests.benchmarks.labelled --preset alexnet --lake FOLDER      # a trained AlexNet, and its pictures
    python -m tests.benchmarks.retrieval --lake FOLDER --count 100000 [--random]

The base is FC2 features of that AlexNet on the labelled pictures, augmented as for training until there are `count`, or
random vectors of the same shape; the queries are the pictures themselves. Both are kept in FOLDER for the next time.
The index is written as the product writes it. Alternatives read the same Parquet files: FAISS's exact search after
loading them by pyarrow (it needs `pip install faiss-cpu`), a Spark SQL cross join, and MLlib's LSH. Runs take turns in
one process. Before each, all files are read, or, with `--disk`, dropped from the system's cache, so that all meet the
same.
"""

import argparse
import importlib
import os
import shutil
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from cbmir_spark import config, storage
from cbmir_spark.config import RetrievalSettings
from cbmir_spark.index import embed as index_embed
from cbmir_spark.index.layout import FEATURES, place_of
from cbmir_spark.index.vector_files import DataFile
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, schemas
from cbmir_spark.lake.arrow import arrow_schema
from cbmir_spark.lake.runs import Stages
from cbmir_spark.models import weights
from cbmir_spark.models.artifact import MANIFEST_FILE, WEIGHTS_FILE
from cbmir_spark.models.layers import Draw
from cbmir_spark.models.projection import Projection
from cbmir_spark.retrieval import answer as answers
from cbmir_spark.retrieval import search
from cbmir_spark.retrieval.query import Query
from cbmir_spark.spark import session
from cbmir_spark.storage import ObjectStore
from cbmir_spark.training import augment
from tests.benchmarks.common import keep, tell
from tests.support.tiny_lake import live_files

Floats = NDArray[np.float32]
K = 10
# Pictures drawn with one seed, so that a bigger base begins with the smaller one.
BLOCK = 100_000

# --- vectors ---


def pictures(lake: Path) -> NDArray[np.uint8]:
    """All pictures of the labelled lake, (n, 256, 256)."""
    return np.stack(
        [np.frombuffer(row, np.uint8).reshape(cols.SIDE, cols.SIDE) for row in _of(lake, cols.PIXELS_COLUMN)]
    )


def classes(lake: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Of each of the same pictures, the partition that it is in, and the class that the network takes it for."""
    folder = next(f for f in sorted((lake / "lake" / FEATURES.name).glob("alexnet-*")) if "small" not in f.name)
    columns = [cols.IMAGE_ID, cols.PREDICTED, cols.MODALITY, cols.BODY_PART]
    rows = pyarrow.dataset.dataset(sorted(map(str, folder.rglob("*.parquet"))), partitioning="hive").to_table(columns)
    found = {row[cols.IMAGE_ID]: row for row in rows.to_pylist()}
    told = [found[image] for image in _of(lake, cols.IMAGE_ID)]
    return [(row[cols.MODALITY], row[cols.BODY_PART]) for row in told], [row[cols.PREDICTED] for row in told]


def _of(lake: Path, column: str) -> list[Any]:
    files = sorted((lake / "lake" / schemas.PIXELS.name).rglob("*.parquet"))
    found: list[Any] = pa.concat_tables([pq.read_table(file, columns=[column]) for file in files])[column].to_pylist()
    return found


def embed(lake: Path, count: int) -> tuple[Floats, Floats]:
    """Features of the pictures, and of `count` pictures made from them; kept below `lake`."""
    asked, made = lake / "asked.npy", lake / f"base-{count}.npy"
    if not made.exists():
        folder = next(f for f in sorted((lake / "lake" / "models").glob("alexnet-*")) if "small" not in f.name)
        loaded = weights.load_files((folder / WEIGHTS_FILE).read_bytes(), (folder / MANIFEST_FILE).read_bytes())
        network = loaded.model.to(memory_format=torch.channels_last)
        pixels = torch.from_numpy(pictures(lake))
        unfinished = lake / "unfinished.npy"
        base = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=(count, 4096))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):

            def run(inputs: torch.Tensor) -> Floats:
                channels_last = inputs.contiguous(memory_format=torch.channels_last)
                found: Floats = network.embed(channels_last).float().numpy()
                return found

            if not asked.exists():
                np.save(asked, np.concatenate([run(network.to_input(part)) for part in pixels.split(64)]))
            for block, begin in enumerate(range(0, count, BLOCK)):
                end = min(begin + BLOCK, count)
                smaller = [file for file in lake.glob("base-*.npy") if int(file.stem.partition("-")[2]) >= end]
                if smaller:
                    base[begin:end] = np.load(smaller[0], mmap_mode="r")[begin:end]
                    continue
                random = torch.Generator().manual_seed(1 + block)
                for start in range(begin, end, 64):
                    chosen = pixels[torch.arange(start, min(start + 64, end)) % len(pixels)]
                    inputs = augment.augment_batch(network.to_input(chosen), Draw(random, 0, len(chosen)))
                    base[start : start + len(chosen)] = run(inputs)
                    if (start - begin) % 6400 == 0:
                        tell(f"{start} of {count} embedded")
        base.flush()
        unfinished.rename(made)
    return np.load(asked), np.load(made, mmap_mode="r")


def vectors_of(lake: Path, count: int, random: bool) -> tuple[Floats, Floats]:
    """Queries, and the base; of trained features, or as random as can be."""
    if not random:
        asked, base = embed(lake, count)
        return asked[np.random.default_rng(1).permutation(len(asked))], base
    drawn = np.random.default_rng(1)
    made = lake / f"random-{count}.npy"
    if not made.exists():
        base = np.lib.format.open_memmap(made, mode="w+", dtype=np.float32, shape=(count, 4096))
        for start in range(0, count, 10_000):
            base[start : start + 10_000] = drawn.standard_normal((len(base[start : start + 10_000]), 4096), np.float32)
        base.flush()
    return np.random.default_rng(2).standard_normal((10_000, 4096), np.float32), np.load(made, mmap_mode="r")


# --- the index ---


def store(spark: SparkSession, lake: Path, source: Path, count: int, projection: Projection, path: str) -> None:
    """FEATURES at `path`, by the product's own layout and writer."""
    places, labels = classes(lake)

    def rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        base = np.load(source, mmap_mode="r")
        schema = arrow_schema(FEATURES.schema)
        for batch in batches:
            for numbers in np.array_split(batch.column(0).to_numpy(), max(1, batch.num_rows // 256)):
                vectors = np.asarray(base[numbers])
                coordinates, residuals = projection.apply(vectors)
                pictured = numbers % len(places)
                values: dict[str, Any] = {
                    cols.IMAGE_ID: [f"{number:032x}" for number in numbers],
                    cols.FRAME: [0] * len(numbers),
                    cols.PREDICTED: [labels[picture] for picture in pictured],
                    cols.PROBABILITY: [0.9] * len(numbers),
                    cols.BODY_PART_SOURCE: [cols.FROM_TAG] * len(numbers),
                    cols.SERIES_ID: [f"{number // 20:032x}" for number in numbers],
                    cols.STUDY_ID: [f"{number // 40:032x}" for number in numbers],
                    cols.PATIENT_ID: [f"{number // 40:032x}" for number in numbers],
                    cols.SEX: ["F"] * len(numbers),
                    cols.AGE_YEARS: [50.0] * len(numbers),
                    cols.YEAR: [2020] * len(numbers),
                    cols.PIXELS_BATCH: [1] * len(numbers),
                    cols.PIXEL_DIGEST: ["0" * 64] * len(numbers),
                    cols.MODALITY: [places[picture][0] for picture in pictured],
                    cols.BODY_PART: [places[picture][1] for picture in pictured],
                }
                made = {name: pa.array(column, schema.field(name).type) for name, column in values.items()}
                for name, matrix in ((cols.VECTOR, vectors), (cols.PROJECTION, coordinates)):
                    offsets = pa.array(np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32))
                    made[name] = pa.ListArray.from_arrays(offsets, pa.array(matrix.reshape(-1)))
                made[cols.RESIDUAL_NORM] = pa.array(residuals)
                yield pa.RecordBatch.from_arrays([made[name] for name in schema.names], schema.names)

    delta.ensure(spark, FEATURES, path)
    for start in range(0, count, 100_000):
        made = spark.range(start, min(start + 100_000, count), numPartitions=8).mapInArrow(rows, FEATURES.schema)
        counts = Counter(places[number % len(places)] for number in range(start, min(start + 100_000, count)))
        delta.append(index_embed.spread(made, counts, 100_000), FEATURES, path, rows_per_file=100_000)


def base_at(spark: SparkSession, path: str, projection: Projection, files: config.StorageSettings) -> answers.Base:
    sizes = {found.uri: found.size for found in ObjectStore(files).list_objects(path)}
    named = [DataFile(n, uri, place_of(uri), sizes[uri]) for n, uri in enumerate(live_files(spark, path))]
    return answers.Base(tuple(named), 4096, projection, ObjectStore(files))


# --- the contestants: each gives (Q, K) squared distances, and its seconds by stage ---


def ours(
    spark: SparkSession,
    base: Callable[[], answers.Base],
    asked: Floats,
    chosen: RetrievalSettings,
    place: tuple[str, str] = ("CT", "CHEST"),
) -> tuple[NDArray[np.float64], Stages, answers.Scanned]:
    stages = Stages()
    squares = []
    total = answers.Scanned()
    with stages.stage("plan"):
        queries = [Query(f"{number:06d}", vector, *place) for number, vector in enumerate(asked)]
    for portion in answers.batches(spark, queries, chosen.k, chosen):
        with stages.stage("plan"):
            files = base()
        answer = search.search(spark, files, portion, chosen, stages)
        squares.append(answer.hits.column(cols.DISTANCE).to_numpy() ** 2)
        total += answer.scanned
    return np.concatenate(squares).reshape(len(asked), -1), stages, total


def faiss_search(files: list[str], count: int, asked: Floats) -> tuple[NDArray[np.float64], Stages]:
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(2)
    pa.set_cpu_count(2)
    stages = Stages()
    vectors = np.empty((count, 4096), dtype=np.float32)
    with stages.stage("load"):
        filled = 0
        for batch in pyarrow.dataset.dataset(files, format="parquet").to_batches(
            columns=[cols.VECTOR], batch_size=4096
        ):
            rows = batch.column(0).flatten().to_numpy().reshape(-1, 4096)
            vectors[filled : filled + len(rows)] = rows
            filled += len(rows)
    with stages.stage("search"):
        found, _ = faiss.knn(asked, vectors[:filled], K)
    return np.asarray(found, dtype=np.float64), stages


def cross_join(spark: SparkSession, rows: DataFrame, asked: Floats) -> None:
    queries = spark.createDataFrame(
        [(n, vector.tolist()) for n, vector in enumerate(asked)], "q long, query array<float>"
    )
    square = F.aggregate(
        F.zip_with(cols.VECTOR, "query", lambda x, q: (x - q) * (x - q)), F.lit(0.0), lambda total, each: total + each
    )
    joined = rows.crossJoin(F.broadcast(queries)).select("q", cols.IMAGE_ID, square.alias("square"))
    joined.groupBy("q").agg(F.min_by(cols.IMAGE_ID, "square")).collect()


def lsh(spark: SparkSession, rows: DataFrame, asked: Floats, limit: float) -> set[tuple[int, str]]:
    from pyspark.ml.feature import BucketedRandomProjectionLSH
    from pyspark.ml.functions import array_to_vector

    queries = spark.createDataFrame(
        [(n, vector.tolist()) for n, vector in enumerate(asked)], "q long, vector array<float>"
    )
    base = rows.select(cols.IMAGE_ID, array_to_vector(cols.VECTOR).alias("features"))
    wanted = queries.select("q", array_to_vector("vector").alias("features"))
    hashing = BucketedRandomProjectionLSH(
        inputCol="features", outputCol="hashes", bucketLength=20.0, numHashTables=3, seed=1
    ).fit(base)
    pairs = hashing.approxSimilarityJoin(wanted, base, limit, "distance")
    return {(row[0], row[1]) for row in pairs.select("datasetA.q", f"datasetB.{cols.IMAGE_ID}").collect()}


def others(spark: SparkSession, rows: DataFrame, asked: Floats, scale: float) -> dict[str, Any]:
    """What Spark itself has, for 100 queries over 2,000 rows; `scale` makes that 1,000 queries over all."""
    share = rows.select(cols.IMAGE_ID, cols.VECTOR).limit(2000).cache()
    table = share.toPandas()
    vectors = np.asarray(table[cols.VECTOR].to_list(), dtype=np.float64)
    exact = np.stack([np.linalg.norm(vectors - query, axis=1) for query in asked.astype(np.float64)])
    limit = float(np.sort(exact, axis=1)[:, K - 1].mean())
    wanted = {(q, table[cols.IMAGE_ID][row]) for q, row in zip(*np.nonzero(exact < limit), strict=True)}
    joined, _ = timed(lambda: cross_join(spark, share, asked))
    hashed, found = timed(lambda: lsh(spark, share, asked, limit))
    share.unpersist()
    told = {
        name: {"seconds": round(s, 1), "extrapolated": round(s * scale)}
        for name, s in (("spark sql, 100 queries x 2000", joined), ("lsh, 100 queries x 2000", hashed))
    }
    return told | {"recall of lsh": round(len(found & wanted) / max(1, len(wanted)), 3)}


def by_tags(
    spark: SparkSession,
    base: Callable[[], answers.Base],
    files: list[str],
    asked: Floats,
    chosen: RetrievalSettings,
    runs: int,
) -> dict[str, Any]:
    """A search of one partition, of a few sizes, beside one of all, by their time and by their share of bytes."""
    sizes = Counter[tuple[str, str]]()
    for file in base().files:
        sizes[file.place] += file.bytes
    places = [place for place, _ in sizes.most_common(9)[::4]]
    tags = chosen.replace(prefilter="tags")
    contestants: dict[str, Callable[[], Any]] = {
        "/".join(place): lambda place=place: ours(spark, base, asked, tags, place) for place in places
    }
    seconds, _ = in_turn(contestants | {"all": lambda: ours(spark, base, asked, chosen)}, files, read, runs)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    told: dict[str, Any] = {"seconds": {name: round(each, 3) for name, each in medians.items()}}
    for place in places:
        share, cost = sizes[place] / sizes.total(), medians["/".join(place)] / medians["all"]
        told["/".join(place)] = {"share of bytes": round(share, 4), "share of time": round(cost, 4)}
    return told


# --- measuring ---


def read(files: list[str]) -> None:
    """Bring all files into the system's cache, which some systems empty of what half a minute did not touch."""
    buffer = bytearray(2**22)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def drop(files: list[str]) -> None:
    """Take all files out of the system's cache, so that they come from the disk."""
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_turn(
    contestants: Mapping[str, Callable[[], Any]], files: list[str], prepare: Callable[[list[str]], None], runs: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The seconds of each contestant's runs, which take turns and begin with the files prepared; what each last gave.

    A first turn, which starts workers, does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, Any] = {}
    for turn in range(runs + 1):
        for name, run in contestants.items():
            prepare(files)
            start = time.perf_counter()
            answers[name] = run()
            took = round(time.perf_counter() - start, 3)
            tell(f"{name}: {took} s" + ("" if turn else ", not counted"))
            seconds[name] += [took] if turn else []
    return seconds, answers


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def peaks() -> dict[str, float]:
    """Greatest resident memory so far, in MB, of this process, of the JVM, and of the biggest Python worker."""
    mine = Path("/proc/self/status").read_text()
    found = {"driver": 0.0, "jvm": 0.0, "worker": 0.0}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text, command = status.read_text(), (status.parent / "cmdline").read_text()
        except OSError:
            continue
        kind = "jvm" if "java" in command.split("\0")[0] else "worker" if "pyspark" in command else None
        kind = "driver" if text == mine else kind
        peak = [int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmHWM")]
        if kind and peak:
            found[kind] = max(found[kind], round(peak[0]))
    own = [int(line.split()[1]) / 1024 for line in mine.splitlines() if line.startswith("VmHWM")]
    return found | {"driver": round(own[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--queries", type=int, nargs="+", default=[1000, 10])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="ours alone, for its cost by size and number of queries")
    parser.add_argument("--tags", action="store_true", help="single partitions beside all of them")
    parser.add_argument("--disk", action="store_true", help="with no file in the system's cache; else all are")
    parser.add_argument("--others", action="store_true", help="Spark SQL and LSH, over a share")
    asked_for = parser.parse_args()
    warnings.simplefilter("ignore")
    kind = "random" if asked_for.random else "features"
    queries, base = vectors_of(asked_for.lake, asked_for.count, asked_for.random)
    settings = config.load(overrides=[f"lake.uri={asked_for.lake / 'bench'}"], environ={})
    spark = session.build(settings, "bench")
    sample = np.asarray(base[:: max(1, len(base) // 6000)])
    projection = Projection.fit([sample])
    path = storage.canonical(str(asked_for.lake / f"index-{kind}-{asked_for.count}"))
    if not delta.exists(spark, path):
        tell("writing the index")
        seconds, _ = timed(lambda: store(spark, asked_for.lake, Path(base.filename), asked_for.count, projection, path))
        tell(f"written in {seconds:.0f} s")
    whole = settings.retrieval.replace(prefilter="none", unique="none", exclude_same="none")
    files = [storage.local_path(uri) for uri in live_files(spark, path)]
    groups = sum(pq.ParquetFile(file).num_row_groups for file in files)
    result: dict[str, Any] = {
        "vectors": f"{asked_for.count} x 4096, {kind}",
        "files": len(files),
        "row groups": groups,
        "megabytes": round(sum(Path(file).stat().st_size for file in files) / 2**20),
        "directions": len(projection.directions),
    }

    def where() -> answers.Base:
        return base_at(spark, path, projection, settings.storage)

    if asked_for.others:
        told = others(spark, delta.read(spark, path), np.resize(queries, (100, 4096)), 10 * asked_for.count / 2000)
        spark.stop()
        tell(str(told))
        keep(f"retrieval by Spark itself, {asked_for.count} {kind} vectors", result | told)
        return
    prepare = drop if asked_for.disk else read
    for number in asked_for.queries:
        asked = np.resize(queries, (number, 4096))
        if asked_for.tags:
            for method in ("scan", "bounds"):
                by_method = whole.replace(method=method)
                told = by_tags(spark, where, files, asked, by_method, asked_for.runs)
                result[f"{method}, {number} queries"] = told
                tell(str(told))
            continue
        contestants: dict[str, Callable[[], Any]] = {"bounds": lambda: ours(spark, where, asked, whole)}  # noqa: B023
        if not asked_for.alone:
            by_scan = whole.replace(method="scan")
            contestants["scan"] = lambda: ours(spark, where, asked, by_scan)  # noqa: B023
            contestants["faiss"] = lambda: faiss_search(files, asked_for.count, asked)  # noqa: B023
        seconds, answers = in_turn(contestants, files, prepare, asked_for.runs)
        squares, _, scanned = answers["bounds"]
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        told = {
            "seconds": seconds,
            "median": {name: round(each, 3) for name, each in medians.items()},
            "stages": {name: {s: round(n, 3) for s, n in each[1].seconds.items()} for name, each in answers.items()},
            "vectors measured": scanned.vectors,
            "megabytes read": round(scanned.bytes / 2**20),
            "peak memory, MB": peaks(),
        }
        if not asked_for.alone:
            assert (squares == answers["scan"][0]).all()
            # FAISS works in float32, so its squares lose digits where they are small.
            far = np.abs(squares - answers["faiss"][0]) / (squares + 1e-3 * np.square(asked).sum(axis=1)[:, None])
            told |= {
                "faiss / scan": round(medians["faiss"] / medians["scan"], 2),
                "faiss / bounds": round(medians["faiss"] / medians["bounds"], 2),
                "greatest difference to faiss": float(far.max()),
            }
        result[f"{number} queries"] = told
        tell(str(told))
    spark.stop()
    what = "retrieval by tags" if asked_for.tags else "retrieval alone" if asked_for.alone else "retrieval"
    keep(f"{what}, {asked_for.count} {kind} vectors" + (", from disk" if asked_for.disk else ""), result)
    shutil.rmtree(asked_for.lake / "bench", ignore_errors=True)


if __name__ == "__main__":
    main()
