"""The rows that Petastorm's batch reader gives, in their order, by file layout, shards, shuffling and seed.

`python -W ignore -m tests.support.petastorm_orders` prints those of the unmodified Petastorm, which needs pyarrow 14;
tests/data/petastorm_orders.json is its output.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# Rows of each row group, by file.
FILES = ((40, 25), (3,), (17, 9, 30), (12, 12, 1))
SEEDS = (1, 7, 2**31 - 1)
SHARDS = (1, 2, 4)
COLUMNS = ("^number$", "^pixels$")


def write(folder: Path) -> list[Path]:
    """Write files whose rows are numbered; their bytes, strings and floats are there to be inferred and left out."""
    schema = pa.schema(
        [("number", pa.int64()), ("pixels", pa.binary()), ("label", pa.string()), ("weight", pa.float32())]
    )
    number, paths = 0, []
    for index, groups in enumerate(FILES):
        paths.append(folder / f"part-{index}.parquet")
        with pq.ParquetWriter(paths[-1], schema) as writer:
            for rows in groups:
                numbers = list(range(number, number + rows))
                values = [numbers, [b"%5d" % each for each in numbers], [str(each) for each in numbers], numbers]
                writer.write_table(pa.table(values, schema=schema), row_group_size=rows)
                number += rows
    return paths


def orders(open_reader: Callable[..., Any]) -> dict[str, list[int]]:
    """Read the files once for each case: the numbers in the order that the reader gives them in."""
    total = sum(map(sum, FILES))
    found = {}
    for seed in (None, *SEEDS):
        for shards in SHARDS:
            for shard in range(shards):
                case = f"shard {shard} of {shards}, " + (f"seed {seed}" if seed else "not shuffled")
                found[case] = _numbers(open_reader, seed, shard, shards)
            given = [number for case, numbers in found.items() if _is_of(case, shards, seed) for number in numbers]
            assert sorted(given) == list(range(total)), f"{shards} shards, seed {seed}"
    return found


def _is_of(case: str, shards: int, seed: int | None) -> bool:
    return f" of {shards}, " in case and case.endswith(f"seed {seed}" if seed else "not shuffled")


def _numbers(open_reader: Callable[..., Any], seed: int | None, shard: int, shards: int) -> list[int]:
    groups = sum(len(groups) for groups in FILES)
    reader = open_reader(
        reader_pool_type="thread",
        workers_count=1,
        shuffle_row_groups=seed is not None,
        shuffle_rows=seed is not None,
        seed=seed,
        num_epochs=1,
        cur_shard=shard,
        shard_count=shards,
        schema_fields=list(COLUMNS),
    )
    return read(reader, len(range(shard, groups, shards)))


def read(reader: Any, groups: int) -> list[int]:
    """Read a number of row groups and close the reader; their numbers."""
    numbers, ends = [], 0
    try:
        while groups:
            try:
                batch = next(reader)
            except StopIteration:
                # It may report the end before its threads have started.
                ends += 1
                assert ends < 6_000, "the reader gave too few row groups"
                time.sleep(0.01)
                continue
            assert [int(pixels) for pixels in batch.pixels] == batch.number.tolist()
            numbers += batch.number.tolist()
            groups -= 1
    finally:
        reader.stop()
        reader.join()
    return numbers


def unmodified(urls: Sequence[str]) -> Callable[..., Any]:
    """Petastorm's own entry point over some files."""
    from petastorm import make_batch_reader

    return lambda **options: make_batch_reader(list(urls), **options)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = write(Path(temporary))
        json.dump(orders(unmodified([path.as_uri() for path in made])), sys.stdout, indent=0)
    sys.stdout.write("\n")
