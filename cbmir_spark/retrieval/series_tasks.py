"""Series as volumes, as tasks make and compare them.

A volume is the frames of one series in one partition of FEATURES. Every vector counts with length one, so that what is
compared is what frames show and not how strongly. A volume's descriptor is the mean of its frames' vectors: components
are rounded to multiples of 2⁻⁴⁴ and added as whole numbers, so that a descriptor is the same bytes in whatever order
and in however many tasks the frames were met. How far a volume is from a query is the mean, over the query's frames,
of the distance to the volume's frame that matches best.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cbmir_spark.index.vector_files import DataFile, OpenFiles, Place, Read, VectorFile
from cbmir_spark.lake import columns as cols
from cbmir_spark.retrieval import kernel, tasks
from cbmir_spark.retrieval.tasks import Job, Share
from cbmir_spark.storage import ObjectStore

# A component of a vector of length one is at most 1, so sums of fewer than 2¹⁹ frames fit into 64 bits.
_STEP = 2.0**-44
# Volumes of which a task holds sums (32 KB each for AlexNet), and whose descriptors are compared at a time.
_VOLUMES_AT_ONCE = 2_048
_FACTS = (cols.STUDY_ID, cols.PATIENT_ID, cols.SEX, cols.AGE_YEARS, cols.YEAR)

# A volume's partition and series.
Key = tuple[Place, str]


@dataclass(frozen=True)
class Part:
    """What one task has met of a volume.

    total: (D,) int64 sum of its n frames' vectors, in steps of 2⁻⁴⁴. image: (n,) bytes, frame: (n,) int64. where:
    (3, n) int32 file, row group and row of each. `facts` are those of the first frame by image and number.
    """

    total: NDArray[np.int64]
    image: NDArray[np.bytes_]
    frame: NDArray[np.int64]
    where: NDArray[np.int32]
    facts: Mapping[str, Any]

    def first(self) -> tuple[bytes, int]:
        return min(zip(self.image.tolist(), self.frame.tolist(), strict=True))


@dataclass(frozen=True)
class Volume:
    """A volume's series and partition, facts of its first frame, and where its n frames are.

    where: (3, n) int32 file, row group and row, in the order of image and frame.
    """

    series_id: str
    place: Place
    facts: Mapping[str, Any]
    where: NDArray[np.int32]

    @property
    def key(self) -> Key:
        return self.place, self.series_id


@dataclass(frozen=True)
class Near:
    """Volumes that may be a query's nearest by descriptor: m pairs of query and place in `volumes`, and their squared
    distances. candidates: (Q,) volumes that each query was compared with.
    """

    query: NDArray[np.int64]
    square: NDArray[np.float64]
    volume: NDArray[np.int64]
    volumes: Sequence[Volume]
    candidates: NDArray[np.int64]

    @staticmethod
    def nothing(queries: int) -> "Near":
        none = np.empty(0, dtype=np.int64)
        return Near(none, none.astype(np.float64), none, [], np.zeros(queries, dtype=np.int64))

    def by_query(self, queries: int) -> list[list[Volume]]:
        """The volumes of each query, in the order of the pairs."""
        found: list[list[Volume]] = [[] for _ in range(queries)]
        for query, volume in zip(self.query.tolist(), self.volume.tolist(), strict=True):
            found[query].append(self.volumes[volume])
        return found


@dataclass(frozen=True)
class Compared:
    """A query by its number, its own volume, and the volumes of which it takes the nearest k."""

    query: int
    k: int
    own: Volume
    others: Sequence[Volume]


@dataclass(frozen=True)
class Comparison:
    """What every task that compares frames is sent; files by number."""

    files: Mapping[int, DataFile]
    dimension: int
    cosine: bool
    block_bytes: int
    store: ObjectStore


# --- arrays ---


def whole_steps(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n, D) vectors → (n, D) components of the same vectors made one long, in whole steps of 2⁻⁴⁴."""
    steps: NDArray[np.int64] = np.rint(kernel.of_length_one(vectors) / _STEP).astype(np.int64)
    return steps


def together(one: Part, other: Part) -> Part:
    """What two tasks, or two blocks, have met of a volume."""
    facts = min((one, other), key=Part.first).facts
    return Part(
        one.total + other.total,
        np.concatenate([one.image, other.image]),
        np.concatenate([one.frame, other.frame]),
        np.concatenate([one.where, other.where], axis=1),
        facts,
    )


def described(key: Key, part: Part) -> tuple[Volume, NDArray[np.float32]]:
    """A volume of which all parts are together, and its descriptor, (D,) float32."""
    place, series_id = key
    order = np.lexsort((part.frame, part.image))
    mean = part.total / (len(order) / _STEP)
    return Volume(series_id, place, part.facts, part.where[:, order]), mean.astype(np.float32)


def distance(
    own: NDArray[np.float32], other: NDArray[np.float32], cosine: bool, budget: int
) -> tuple[float, tuple[int, int]]:
    """How far a volume is from a query's, (m, D) and (n, D), and the pair of their frames that are nearest.

    The mean over the query's frames of the least distance to a frame of the other; all vectors are made one long.
    """
    search = kernel.Search(own, np.ones(len(own), dtype=np.int64), budget, cosine=True)
    search.add(other, kernel.Keys(np.zeros(len(other), "S1"), np.arange(len(other)), None))
    nearest = search.results()
    best = int(np.lexsort((nearest.query, nearest.row, nearest.square))[0])
    found = float(np.mean(kernel.distances(nearest.square, cosine)))
    return found, (int(nearest.query[best]), int(nearest.row[best]))


# --- tasks ---


def parts(
    shares: Sequence[Share], wanted: frozenset[Key] | None, dimension: int, imputed: bool, job: Comparison
) -> Iterator[tuple[Key, Part | Read]]:
    """What a task's files hold of each volume, of those `wanted` (None: of all), and last what was read for it.

    Memory: a block of vectors of `block_bytes` at most, or one row group, and the sums of _VOLUMES_AT_ONCE volumes.
    """
    # A vector is read as float32; its length, its steps and their sums take eight bytes a number.
    height = max(1, job.block_bytes // (36 * dimension))
    columns = (cols.IMAGE_ID, cols.FRAME, cols.SERIES_ID, cols.BODY_PART_SOURCE, *_FACTS)
    held: dict[Key, Part] = {}
    read = Read()
    for share in shares:
        with VectorFile(share.file, job.store) as file:
            for row_groups in file.portions(share.part, share.of, height):
                rows = file.table(row_groups, columns)
                where = tasks.places_of(file, share.file.number, row_groups)
                kept = np.ones(len(rows), dtype=bool) if imputed else tasks.not_imputed(rows)
                if wanted is not None:
                    series = rows.column(cols.SERIES_ID).to_pylist()
                    kept &= np.array([(file.place, each) in wanted for each in series], dtype=bool)
                if not kept.any():
                    continue
                where = where[:, kept]
                vectors = np.empty((where.shape[1], dimension), dtype=np.float32)
                if kept.all():
                    file.vectors(cols.VECTOR, row_groups, dimension, vectors)
                else:
                    file.some_vectors(cols.VECTOR, where[1], where[2], vectors)
                for key, part in _by_series(file.place, rows.filter(pa.array(kept)), vectors, where):
                    held[key] = together(held[key], part) if key in held else part
                if len(held) > _VOLUMES_AT_ONCE:
                    yield from held.items()
                    held.clear()
            read += file.read
    yield from held.items()
    yield NOTHING, read


# Under this key tasks tell what they have read.
NOTHING: Key = (("", ""), "")


def merged(one: Part | Read, other: Part | Read) -> Part | Read:
    """Two values of one key, as `parts` gives them."""
    if isinstance(one, Read) or isinstance(other, Read):
        assert isinstance(one, Read) and isinstance(other, Read)
        return one + other
    return together(one, other)


def _by_series(
    place: Place, rows: pa.Table, vectors: NDArray[np.float32], where: tasks.Places
) -> Iterator[tuple[Key, Part]]:
    series = np.array(rows.column(cols.SERIES_ID).to_pylist(), dtype=np.bytes_)
    image = np.array(rows.column(cols.IMAGE_ID).to_pylist(), dtype=np.bytes_)
    frame = rows.column(cols.FRAME).to_numpy().astype(np.int64)
    facts = rows.select(_FACTS).to_pylist()
    order = np.lexsort((frame, image, series))
    begins = np.flatnonzero(np.concatenate([[True], series[order][1:] != series[order][:-1]]))
    totals = np.add.reduceat(whole_steps(vectors)[order], begins, axis=0)
    for total, start, end in zip(totals, begins, [*begins[1:], len(order)], strict=True):
        here = order[start:end]
        key = (place, series[here[0]].decode())
        yield key, Part(total, image[here], frame[here], where[:, here].astype(np.int32), facts[here[0]])


def nearest(volumes: Iterable[tuple[Volume, NDArray[np.float32]]], job: Job) -> Near:
    """The volumes of a task's share whose descriptors may be among the `job.k` nearest of each query's."""
    search = kernel.Search(job.vectors, job.k, job.block_bytes // 2)
    places = sorted(job.list_of)
    kept: dict[int, Volume] = {}
    waiting: dict[Place, list[tuple[Volume, NDArray[np.float32]]]] = {}

    def compare(place: Place) -> None:
        found = [volume for volume, _ in waiting[place]]
        facts = pa.Table.from_pylist([{**each.facts, cols.SERIES_ID: each.series_id} for each in found], _OF_VOLUME)
        names = np.array([each.series_id for each in found], dtype=np.bytes_)
        group = None if job.group is None else np.array(facts.column(job.group).to_pylist(), dtype=np.bytes_)
        # Partitions break what ties there are between volumes of one series.
        keys = kernel.Keys(names, np.full(len(found), places.index(place)), group)
        kept.update(enumerate(found, start=search.rows_seen))
        vectors = np.stack([vector for _, vector in waiting.pop(place)])
        search.add(vectors, keys, job.lists[job.list_of[place]], tasks.hidden(facts, job))
        for number in set(kept) - set(search.rows.tolist()):
            del kept[number]

    for volume, vector in volumes:
        waiting.setdefault(volume.place, []).append((volume, vector))
        if sum(map(len, waiting.values())) == _VOLUMES_AT_ONCE:
            for place in sorted(waiting):
                compare(place)
    for place in sorted(waiting):
        compare(place)
    results = search.results()
    numbers, volume_of = np.unique(results.row, return_inverse=True)
    return Near(results.query, results.square, volume_of, [kept[int(number)] for number in numbers], search.candidates)


_OF_VOLUME = pa.schema(
    [
        (cols.SERIES_ID, pa.string()),
        (cols.STUDY_ID, pa.string()),
        (cols.PATIENT_ID, pa.string()),
        (cols.SEX, pa.string()),
        (cols.AGE_YEARS, pa.float64()),
        (cols.YEAR, pa.int32()),
    ]
)


@dataclass(frozen=True)
class Ranked:
    """Hits of some queries, each query's in the order of distance, and as row of `rows` (SHOWN columns and partitions)
    the frame that matches best.
    """

    query: NDArray[np.int64]
    distance: NDArray[np.float64]
    row: NDArray[np.int64]
    rows: pa.Table
    read: Read


def ranked(queries: Sequence[Compared], job: Comparison) -> Ranked:
    """The nearest volumes of some queries, by their frames.

    Memory: the frames of a query and of one other volume, and up to `block_bytes` of volumes that were read before.
    """
    hits: list[tuple[int, float, NDArray[np.int32]]] = []
    with OpenFiles(job.files, job.store) as files:
        volumes = _Volumes(job, files)
        for each in queries:
            own = volumes.vectors(each.own)
            found = []
            for other in each.others:
                far, (_, frame) = distance(own, volumes.vectors(other), job.cosine, job.block_bytes // 2)
                found.append((far, other.series_id, other.place, other.where[:, frame]))
            found.sort(key=lambda hit: hit[:3])
            hits += [(each.query, far, where) for far, _, _, where in found[: each.k]]
        where = np.array([hit[2] for hit in hits], dtype=np.int32).reshape(-1, 3)
        rows, row = tasks.shown(files, where.T) if hits else (pa.table({}), np.empty(0, dtype=np.int64))
        read = files.read
    query = np.array([hit[0] for hit in hits], dtype=np.int64)
    return Ranked(query, np.array([hit[1] for hit in hits], dtype=np.float64), row, rows, read)


class _Volumes:
    """Frames' vectors of volumes, read by their place; those that were read last are kept."""

    def __init__(self, job: Comparison, files: OpenFiles) -> None:
        self._job = job
        self._files = files
        self._kept: OrderedDict[Key, NDArray[np.float32]] = OrderedDict()
        self._bytes = 0

    def vectors(self, volume: Volume) -> NDArray[np.float32]:
        """(n, D) the vectors of a volume's frames, in their order."""
        if volume.key in self._kept:
            self._kept.move_to_end(volume.key)
            return self._kept[volume.key]
        made = np.empty((volume.where.shape[1], self._job.dimension), dtype=np.float32)
        file, row_group, row = volume.where
        for number in np.unique(file).tolist():
            here = np.flatnonzero(file == number)
            part = np.empty((len(here), self._job.dimension), dtype=np.float32)
            self._files[number].some_vectors(cols.VECTOR, row_group[here], row[here], part)
            made[here] = part
        self._kept[volume.key] = made
        self._bytes += made.nbytes
        while self._bytes > self._job.block_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes
        return made
