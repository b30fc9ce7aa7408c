"""Decode Parquet data pages of fixed-length float lists without a Parquet reader."""

import pyarrow.parquet as pq

# A page's header, as far as the number of its values: five 32-bit numbers of at most six bytes each, and a byte.
HEADER_BYTES = 64
# Thrift's types in the compact protocol.
_INT, _STRUCT = 5, 12


def first_byte(chunk: pq.ColumnChunkMetaData) -> int:
    """Where in its file a chunk begins: with its dictionary, where it has one."""
    return int(chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset)


def as_in_memory(chunk: pq.ColumnChunkMetaData, values: int) -> bool:
    """Whether a chunk holds just so many numbers, as they are in memory."""
    told = chunk.statistics
    return (
        chunk.physical_type == "FLOAT"
        and chunk.compression == "UNCOMPRESSED"
        and set(chunk.encodings) <= {"PLAIN", "RLE", "BIT_PACKED"}
        and not chunk.has_dictionary_page
        and chunk.num_values == values
        and told is not None
        and told.has_null_count
        and told.null_count == 0
    )


def page_values(header: bytes) -> int | None:
    """How many values the uncompressed data page has that a header begins; None where it begins something else.

    A header is a Thrift struct in the compact protocol (Parquet format, "Metadata", PageHeader): type, uncompressed and
    compressed size, perhaps a checksum, and the header of a data page, field 5, or of one of version 2, field 8, which
    itself begins with the number of values.
    """
    place = 0

    def number() -> int:
        """A zigzag number, seven bits a byte."""
        nonlocal place
        value = shift = 0
        while True:
            byte = header[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return (value >> 1) ^ -(value & 1)

    found: dict[int, int] = {}
    field = 0
    try:
        while True:
            step, kind = header[place] >> 4, header[place] & 0x0F
            place += 1
            field += step
            if kind == _STRUCT and field in (5, 8) and header[place] == 0x10 | _INT:
                place += 1
                same = found.get(2) == found.get(3)
                return number() if same and found.get(1) == {5: 0, 8: 3}[field] else None
            if kind != _INT or not step:
                return None
            found[field] = number()
    except IndexError:
        return None
