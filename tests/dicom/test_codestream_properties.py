"""A frame is accepted only if its codestream matches the header: random headers around random codestreams.

What is decoded has the values that imagecodecs finds in the stream, taken as the header says; where header and stream
contradict each other, or bytes are missing, the object is rejected.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cbmir_spark.dicom import codecs, preflight, stored
from cbmir_spark.dicom.quiet import quiet
from cbmir_spark.dicom.read import Rejected
from tests.support import encapsulated, streams
from tests.support.dicom_files import header as parsed
from tests.support.encapsulated import Header
from tests.support.streams import CODECS, RLE, Codec, Stream

# pydicom warns of most of these files when they are written.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

SAME_EVERYWHERE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
SYNTAXES = (encapsulated.NATIVE, *dict.fromkeys(syntax for codec in CODECS for syntax in codec.syntaxes))
GRAY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


@dataclass(frozen=True)
class Case:
    """An object: streams in fragments below a header; `intact` where no byte of a stream is missing or strange."""

    streams: tuple[Stream, ...]
    header: Header
    fragments: list[list[bytes]]
    table: str = "none"
    extended: str = "none"
    intact: bool = True

    @property
    def content(self) -> bytes:
        return encapsulated.object_of(self.header, self.fragments, self.table, self.extended)

    @property
    def meanings(self) -> list[NDArray[np.int64] | None]:
        return [encapsulated.meaning(stream, self.header) for stream in self.streams]

    @property
    def must_decode(self) -> bool:
        header = self.header
        is_run_lengths = self.streams[0].codec.name == "RLE"
        return (
            self.intact
            and header.frames == len(self.streams)
            and all(values is not None for values in self.meanings)
            and len({stream.values.shape for stream in self.streams}) == 1
            and (header.syntax == RLE if is_run_lengths else True)
            and header.photometric in (GRAY if header.samples == 1 else COLOR)
            and header.allocated in (8, 16, 32)
        )


@st.composite
def streams_of(draw: st.DrawFn, codec: Codec) -> tuple[Stream, ...]:
    """Draw the frames of an object, all of one codec, depth and shape."""
    depth = draw(st.sampled_from(codec.depths))
    signed = codec.signed and draw(st.booleans())
    samples = draw(st.sampled_from((1, 1, 3)))
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    content = draw(st.sampled_from(("noise", "slope", "steps", "flat")))
    option, seed = draw(st.integers(0, 11)), draw(st.integers(0, 2**16))
    count = draw(st.sampled_from((1, 1, 1, 2, 3)))
    return tuple(
        streams.encode(
            codec,
            streams.picture(content, rows, columns, samples, depth, signed, seed + number),
            depth,
            signed,
            option,
        )
        for number in range(count)
    )


@st.composite
def pieces(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Split a codestream into up to three fragments of even lengths, the first longer than a magic number."""
    places = sorted({2 * place for place in draw(st.lists(st.integers(6, max(6, len(data) // 2 - 1)), max_size=2))})
    # SPIFF headers of JPEG-LS contain a second SOI, where a codestream seems to begin.
    ends = [*(place for place in places if place < len(data) and data[place : place + 2] != b"\xff\xd8"), len(data)]
    return [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@st.composite
def agreements(draw: st.DrawFn, codec: Codec) -> Case:
    """Draw streams and a header that says the same, in all the ways in which headers may."""
    found = draw(streams_of(codec))
    option = draw(st.integers(0, 5))
    header = encapsulated.agreeing(found[0], option)
    header = replace(header, frames=len(found), planar=draw(st.integers(0, 1)))
    changes: dict[str, Any] = {}
    if header.samples == 1:
        changes["photometric"] = draw(st.sampled_from(GRAY))
    if not found[0].codec.signed:
        changes["signed"] = draw(st.booleans())
    if header.allocated == 8 and draw(st.booleans()):
        changes["allocated"] = 16
    fragments = [draw(pieces(stream.data)) for stream in found]
    kinds = st.sampled_from(("none", "right"))
    return Case(found, replace(header, **changes), fragments, draw(kinds), draw(kinds))


@st.composite
def disagreements(draw: st.DrawFn, codec: Codec) -> Case:
    """Draw streams, a header that may say anything else, and fragments that may be damaged."""
    found = list(draw(streams_of(codec)))
    header = replace(encapsulated.agreeing(found[0], draw(st.integers(0, 5))), frames=len(found))
    if len(found) > 1 and draw(st.booleans()):
        found[draw(st.integers(0, len(found) - 1))] = draw(streams_of(codec))[0]
    header = draw(other_headers(header))
    fragments = [draw(pieces(stream.data)) for stream in found]
    damage = draw(st.sampled_from(("none", "none", "cut", "zeros", "ones", "lost", "twice")))
    frame = draw(st.integers(0, len(found) - 1))
    if damage == "cut":
        whole = b"".join(fragments[frame])
        # Padding hides that one byte of RLE is missing.
        least = 2 if found[0].codec.name == "RLE" else 1
        most = draw(st.sampled_from((4, 16, len(whole) - 1)))
        fragments[frame] = [whole[: -draw(st.integers(least, min(most, len(whole) - 1)))]]
    elif damage in ("zeros", "ones"):
        fragments[frame][-1] += (b"\0" if damage == "zeros" else b"\xff") * draw(st.integers(1, 6))
    elif damage == "lost" and len(fragments[frame]) > 1:
        del fragments[frame][-1]
    elif damage == "lost" and len(found) > 1:
        del found[frame], fragments[frame]
    elif damage == "twice":
        found.insert(frame, found[frame])
        fragments.insert(frame, fragments[frame])
    kinds = st.sampled_from(("none", "none", "right", "shifted", "next", "zeros", "short"))
    return Case(tuple(found), header, fragments, draw(kinds), draw(kinds), damage in ("none", "zeros"))


@st.composite
def other_headers(draw: st.DrawFn, header: Header) -> Header:
    fields = ("rows", "columns", "swapped", "samples", "allocated", "stored", "high", "signed", "planar")
    for field in draw(st.lists(st.sampled_from((*fields, "photometric", "frames", "syntax")), max_size=3)):
        if field in ("rows", "columns"):
            near = getattr(header, field) + draw(st.sampled_from((-1, 1)))
            header = replace(header, **{field: max(1, draw(st.sampled_from((near, draw(st.integers(1, 26))))))})
        elif field == "swapped":
            header = replace(header, rows=header.columns, columns=header.rows)
        elif field == "samples":
            header = replace(header, samples=4 - header.samples)
            if draw(st.booleans()):
                header = replace(header, photometric="RGB" if header.samples == 3 else "MONOCHROME2")
        elif field == "allocated":
            allocated = draw(st.sampled_from((1, 8, 8, 12, 16, 16, 32, 64)))
            bits = min(header.stored, allocated)
            header = replace(header, allocated=allocated, stored=bits, high=bits - 1)
        elif field == "stored":
            bits = draw(st.integers(1, header.allocated))
            header = replace(header, stored=bits, high=bits - 1)
        elif field == "high":
            header = replace(header, high=draw(st.integers(0, header.allocated)))
        elif field in ("signed", "planar"):
            header = replace(header, **{field: type(getattr(header, field))(1 - getattr(header, field))})
        elif field == "photometric":
            header = replace(header, photometric=draw(st.sampled_from((*GRAY, *COLOR))))
        elif field == "frames":
            header = replace(header, frames=draw(st.integers(1, 4)))
        else:
            header = replace(header, syntax=draw(st.sampled_from(SYNTAXES)))
    return header


def decoded(content: bytes) -> dict[int, tuple[NDArray[Any], str] | None]:
    """Decode each frame to its values and photometric interpretation; None where it is rejected."""
    ds, layout = parsed(content), preflight.examine(content)
    try:
        described = stored.describe(ds, layout)
    except Rejected:
        return {}
    found: dict[int, tuple[NDArray[Any], str] | None] = {}
    for number in range(described.frames):
        try:
            with quiet():
                ((_, values, photometric),) = codecs.decode(ds, layout, described, [number])
            found[number] = values, photometric
        except Rejected:
            found[number] = None
    return found


def check(case: Case) -> str:
    """Compare what is decoded with what the streams mean; return what became of the object."""
    frames = decoded(case.content)
    meanings = case.meanings
    for number, frame in frames.items():
        if frame is None:
            continue
        values, photometric = frame
        assert number < len(meanings), "a frame that is not there"
        wanted = meanings[number]
        assert wanted is not None, "header and stream contradict each other"
        assert values.shape == wanted.shape
        stream = case.streams[number]
        assert encapsulated.difference(values, wanted, stream, case.header) <= stream.codec.bound
        if stream.samples == 3:
            assert (photometric == "RGB") == encapsulated.is_rgb(stream, case.header.photometric)
    whole = bool(frames) and all(frame is not None for frame in frames.values())
    assert whole or not case.must_decode, "header and streams agree"
    return "decoded" if whole else "rejected"


def check_all(strategy: st.SearchStrategy[Case], examples: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()

    @settings(SAME_EVERYWHERE, max_examples=examples)
    @given(strategy)
    def run(case: Case) -> None:
        outcomes[check(case)] += 1

    run()
    assert sum(outcomes.values()) >= examples
    return outcomes


# Of each codec.
EXAMPLES = pytest.mark.parametrize(
    "examples",
    [pytest.param(100, id="ci"), pytest.param(2_500, id="soak", marks=[pytest.mark.soak, pytest.mark.timeout(3_600)])],
)


@EXAMPLES
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_a_header_that_agrees_is_decoded_exactly(codec: Codec, examples: int) -> None:
    assert set(check_all(agreements(codec), examples)) == {"decoded"}


@EXAMPLES
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_a_header_that_disagrees_never_gives_other_values(codec: Codec, examples: int) -> None:
    outcomes = check_all(disagreements(codec), examples)
    assert outcomes["decoded"] > examples / 8 and outcomes["rejected"] > examples / 8
