"""What a task of a series search does: build volumes and compare them.

A volume is the frames of one series in one partition of FEATURES. All vectors are L2-normalised, so that frames are
compared by what they show and not how strongly. A volume's descriptor is the mean of its frames' vectors: components
are rounded to multiples of 2⁻⁴⁴ and added as integers, so that a descriptor has the same bytes in whatever order and
in however many tasks the frames were read. The distance of a volume from a query is the mean, over the query's frames,
of the distance to the best matching frame of the volume.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cbmir_spark.index.layout import Place
from cbmir_spark.index.vector_files import DataFile, OpenFiles, Read, VectorFile
from cbmir_spark.lake import columns as cols
from cbmir_spark.retrieval import kernel, tasks
from cbmir_spark.retrieval.tasks import SearchInputs, Share
from cbmir_spark.storage import ObjectStore

# A component of an L2-normalised vector is at most 1, so sums of fewer than 2¹⁹ frames fit into 64 bits.
_STEP = 2.0**-44
# Volumes that a task sums up (32 KB each for AlexNet), and whose descriptors it compares, at a time.
_VOLUMES_AT_ONCE = 2_048
_FACTS = (cols.STUDY_ID, cols.PATIENT_ID, cols.SEX, cols.AGE_YEARS, cols.YEAR)

# A volume's partition and series.
Key = tuple[Place, str]


@dataclass(frozen=True)
class Part:
    """The frames of a volume that one task has read.

    total: (D,) int64 sum of the n frames' vectors, in steps of 2⁻⁴⁴. image: (n,) bytes, frame: (n,) int64. where:
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
class NearestVolumes:
    """Volumes that may be a query's nearest by descriptor.

    query, volume, square: (m,) pairs of a query and a volume, by its number in `volumes`, and their squared distance.
    candidates: (Q,) volumes that each query was compared with.
    """

    query: NDArray[np.int64]
    square: NDArray[np.float64]
    volume: NDArray[np.int64]
    volumes: Sequence[Volume]
    candidates: NDArray[np.int64]

    @staticmethod
    def nothing(queries: int) -> "NearestVolumes":
        none = np.empty(0, dtype=np.int64)
        return NearestVolumes(none, none.astype(np.float64), none, [], np.zeros(queries, dtype=np.int64))

    def by_query(self, queries: int) -> list[list[Volume]]:
        """List the volumes of each query, in the order of the pairs."""
        found: list[list[Volume]] = [[] for _ in range(queries)]
        for query, volume in zip(self.query.tolist(), self.volume.tolist(), strict=True):
            found[query].append(self.volumes[volume])
        return found


@dataclass(frozen=True)
class QueryVolume:
    """A query by its number, its volume, and the candidates of which it takes the nearest k."""

    query: int
    k: int
    volume: Volume
    candidates: Sequence[Volume]


@dataclass(frozen=True)
class ComparisonInputs:
    """What the driver broadcasts to tasks that compare frames; files by number."""

    files: Mapping[int, DataFile]
    dimension: int
    cosine: bool
    block_bytes: int
    store: ObjectStore


# --- arrays ---


def fixed_point(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Convert (n, D) vectors to (n, D) int64: components of the L2-normalised vectors, in steps of 2⁻⁴⁴."""
    steps: NDArray[np.int64] = np.rint(kernel.l2_normalize(vectors) / _STEP).astype(np.int64)
    return steps


def merge(one: Part, other: Part) -> Part:
    """Merge the parts of a volume from two tasks or two blocks."""
    facts = min((one, other), key=Part.first).facts
    return Part(
        one.total + other.total,
        np.concatenate([one.image, other.image]),
        np.concatenate([one.frame, other.frame]),
        np.concatenate([one.where, other.where], axis=1),
        facts,
    )


def describe(key: Key, part: Part) -> tuple[Volume, NDArray[np.float32]]:
    """Build a volume from its merged part, and its descriptor, (D,) float32."""
    place, series_id = key
    order = np.lexsort((part.frame, part.image))
    mean = part.total / (len(order) / _STEP)
    return Volume(series_id, place, part.facts, part.where[:, order]), mean.astype(np.float32)


def distance(
    query: NDArray[np.float32], other: NDArray[np.float32], cosine: bool, budget: int
) -> tuple[float, tuple[int, int]]:
    """Return the distance of a volume, (n, D), from a query's, (m, D), and the nearest pair of their frames.

    The distance is the mean over the query's frames of the least distance to a frame of the other; all vectors are
    L2-normalised.
    """
    search = kernel.Search(query, np.ones(len(query), dtype=np.int64), budget, cosine=True)
    search.add(other, kernel.Keys(np.zeros(len(other), "S1"), np.arange(len(other)), None))
    nearest = search.results()
    best = int(np.lexsort((nearest.query, nearest.row, nearest.square))[0])
    found = float(np.mean(kernel.distances(nearest.square, cosine)))
    return found, (int(nearest.query[best]), int(nearest.row[best]))


# --- tasks ---


def parts(
    shares: Sequence[Share], wanted: frozenset[Key] | None, dimension: int, imputed: bool, inputs: ComparisonInputs
) -> Iterator[tuple[Key, Part | Read]]:
    """Yield what a share of files holds of each volume, of those `wanted` (None: of all); last, what was read.

    Memory: a block of vectors of `block_bytes` at most, or one row group, and the sums of _VOLUMES_AT_ONCE volumes.
    """
    # A vector is read as float32; its norm, its steps and their sums take eight bytes a number.
    height = max(1, inputs.block_bytes // (36 * dimension))
    columns = (cols.IMAGE_ID, cols.FRAME, cols.SERIES_ID, cols.BODY_PART_SOURCE, *_FACTS)
    sums: dict[Key, Part] = {}
    read = Read()
    for share in shares:
        with VectorFile(share.file, inputs.store) as file:
            for row_groups in file.batches(share.part, share.of, height):
                rows = file.table(row_groups, columns)
                where = tasks.locations_of(file, share.file.number, row_groups)
                selected = np.ones(len(rows), dtype=bool) if imputed else tasks.not_imputed(rows)
                if wanted is not None:
                    series = rows.column(cols.SERIES_ID).to_pylist()
                    selected &= np.array([(file.place, each) in wanted for each in series], dtype=bool)
                if not selected.any():
                    continue
                where = where[:, selected]
                vectors = np.empty((where.shape[1], dimension), dtype=np.float32)
                if selected.all():
                    file.vectors(cols.VECTOR, row_groups, dimension, vectors)
                else:
                    file.some_vectors(cols.VECTOR, where[1], where[2], vectors)
                for key, part in _by_series(file.place, rows.filter(pa.array(selected)), vectors, where):
                    sums[key] = merge(sums[key], part) if key in sums else part
                if len(sums) > _VOLUMES_AT_ONCE:
                    yield from sums.items()
                    sums.clear()
            read += file.read
    yield from sums.items()
    yield READ_STATISTICS, read


# The key under which tasks report what they have read.
READ_STATISTICS: Key = (("", ""), "")


def merge_values(one: Part | Read, other: Part | Read) -> Part | Read:
    """Merge two values of one key of `parts`."""
    if isinstance(one, Read) or isinstance(other, Read):
        assert isinstance(one, Read) and isinstance(other, Read)
        return one + other
    return merge(one, other)


def _by_series(
    place: Place, rows: pa.Table, vectors: NDArray[np.float32], where: tasks.Locations
) -> Iterator[tuple[Key, Part]]:
    series = np.array(rows.column(cols.SERIES_ID).to_pylist(), dtype=np.bytes_)
    image = np.array(rows.column(cols.IMAGE_ID).to_pylist(), dtype=np.bytes_)
    frame = rows.column(cols.FRAME).to_numpy().astype(np.int64)
    facts = rows.select(_FACTS).to_pylist()
    order = np.lexsort((frame, image, series))
    begins = np.flatnonzero(np.concatenate([[True], series[order][1:] != series[order][:-1]]))
    totals = np.add.reduceat(fixed_point(vectors)[order], begins, axis=0)
    for total, start, end in zip(totals, begins, [*begins[1:], len(order)], strict=True):
        here = order[start:end]
        key = (place, series[here[0]].decode())
        yield key, Part(total, image[here], frame[here], where[:, here].astype(np.int32), facts[here[0]])


def nearest(volumes: Iterable[tuple[Volume, NDArray[np.float32]]], inputs: SearchInputs) -> NearestVolumes:
    """Find the volumes of a task's share whose descriptors may be among the nearest k of each query."""
    search = kernel.Search(inputs.vectors, inputs.k, inputs.block_bytes // 2)
    places = sorted(inputs.list_of)
    contenders: dict[int, Volume] = {}
    waiting: dict[Place, list[tuple[Volume, NDArray[np.float32]]]] = {}

    def compare(place: Place) -> None:
        found = [volume for volume, _ in waiting[place]]
        facts = pa.Table.from_pylist([{**each.facts, cols.SERIES_ID: each.series_id} for each in found], _OF_VOLUME)
        names = np.array([each.series_id for each in found], dtype=np.bytes_)
        group = None if inputs.group is None else np.array(facts.column(inputs.group).to_pylist(), dtype=np.bytes_)
        # Partitions break what ties there are between volumes of one series.
        keys = kernel.Keys(names, np.full(len(found), places.index(place)), group)
        contenders.update(enumerate(found, start=search.rows_seen))
        vectors = np.stack([vector for _, vector in waiting.pop(place)])
        search.add(vectors, keys, inputs.lists[inputs.list_of[place]], tasks.excluded_pairs(facts, inputs))
        for number in set(contenders) - set(search.rows.tolist()):
            del contenders[number]

    for volume, vector in volumes:
        waiting.setdefault(volume.place, []).append((volume, vector))
        if sum(map(len, waiting.values())) == _VOLUMES_AT_ONCE:
            for place in sorted(waiting):
                compare(place)
    for place in sorted(waiting):
        compare(place)
    results = search.results()
    numbers, volume_of = np.unique(results.row, return_inverse=True)
    return NearestVolumes(
        results.query, results.square, volume_of, [contenders[int(number)] for number in numbers], search.candidates
    )


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
    """Hits of some queries, each query's by distance.

    query, distance, row: (m,) per hit; `row` numbers the best matching frame in `rows` (HIT_COLUMNS and partitions).
    """

    query: NDArray[np.int64]
    distance: NDArray[np.float64]
    row: NDArray[np.int64]
    rows: pa.Table
    read: Read


def rank(queries: Sequence[QueryVolume], inputs: ComparisonInputs) -> Ranked:
    """Find the nearest volumes of some queries, by their frames.

    Memory: the frames of a query and of one other volume, and a cache of up to `block_bytes` of volumes.
    """
    hits: list[tuple[int, float, NDArray[np.int32]]] = []
    with OpenFiles(inputs.files, inputs.store) as files:
        volumes = _Volumes(inputs, files)
        for each in queries:
            query_vectors = volumes.vectors(each.volume)
            found = []
            for other in each.candidates:
                far, (_, frame) = distance(
                    query_vectors, volumes.vectors(other), inputs.cosine, inputs.block_bytes // 2
                )
                found.append((far, other.series_id, other.place, other.where[:, frame]))
            found.sort(key=lambda hit: hit[:3])
            hits += [(each.query, far, where) for far, _, _, where in found[: each.k]]
        where = np.array([hit[2] for hit in hits], dtype=np.int32).reshape(-1, 3)
        rows, row = tasks.hit_rows(files, where.T) if hits else (pa.table({}), np.empty(0, dtype=np.int64))
        read = files.read
    query = np.array([hit[0] for hit in hits], dtype=np.int64)
    return Ranked(query, np.array([hit[1] for hit in hits], dtype=np.float64), row, rows, read)


class _Volumes:
    """The vectors of volumes' frames, read by location; a cache holds the latest."""

    def __init__(self, inputs: ComparisonInputs, files: OpenFiles) -> None:
        self._inputs = inputs
        self._files = files
        self._cache: OrderedDict[Key, NDArray[np.float32]] = OrderedDict()
        self._bytes = 0

    def vectors(self, volume: Volume) -> NDArray[np.float32]:
        """Return the (n, D) vectors of a volume's frames, in their order."""
        if volume.key in self._cache:
            self._cache.move_to_end(volume.key)
            return self._cache[volume.key]
        made = np.empty((volume.where.shape[1], self._inputs.dimension), dtype=np.float32)
        file, row_group, row = volume.where
        for number in np.unique(file).tolist():
            here = np.flatnonzero(file == number)
            part = np.empty((len(here), self._inputs.dimension), dtype=np.float32)
            self._files[number].some_vectors(cols.VECTOR, row_group[here], row[here], part)
            made[here] = part
        self._cache[volume.key] = made
        self._bytes += made.nbytes
        while self._bytes > self._inputs.block_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= dropped.nbytes
        return made
