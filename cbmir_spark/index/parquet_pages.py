"""Find the values of a Parquet column chunk in its file, from footer and page header alone."""

import pyarrow.parquet as pq

# A page header up to its number of values: five 32-bit numbers of at most six bytes each, and a byte.
HEADER_BYTES = 64
# Thrift's types in the compact protocol.
_INT, _STRUCT = 5, 12


def first_byte(chunk: pq.ColumnChunkMetaData) -> int:
    """The offset of a chunk in its file; a dictionary comes first."""
    return int(chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset)


def as_in_memory(chunk: pq.ColumnChunkMetaData, values: int) -> bool:
    """True if a chunk holds exactly so many float32 values, encoded as in memory."""
    statistics = chunk.statistics
    return (
        chunk.physical_type == "FLOAT"
        and chunk.compression == "UNCOMPRESSED"
        and set(chunk.encodings) <= {"PLAIN", "RLE", "BIT_PACKED"}
        and not chunk.has_dictionary_page
        and chunk.num_values == values
        and statistics is not None
        and statistics.has_null_count
        and statistics.null_count == 0
    )


def page_values(header: bytes) -> int | None:
    """The number of values of the uncompressed data page that a header describes; None for any other header.

    A header is a Thrift struct in the compact protocol (Parquet format, "Metadata", PageHeader): type, uncompressed and
    compressed size, perhaps a checksum, and the header of a data page, field 5, or of one of version 2, field 8, which
    itself begins with the number of values.
    """
    place = 0

    def number() -> int:
        """Read a zigzag number, seven bits per byte."""
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
