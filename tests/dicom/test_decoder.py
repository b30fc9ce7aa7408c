"""The child process that decodes: it dies in every possible way, and each time one file is lost.

The faults come from a real pydicom plugin for RLE, which only the child loads: tests/support/codec_plugin.py.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cbmir_spark.dicom import decoder as dicom_decoder
from cbmir_spark.dicom.decoder import Decoder
from cbmir_spark.dicom.read import NotAnImage, Reason, Rejected, read_instance
from cbmir_spark.errors import EnvironmentProblem
from tests.support import codec_plugin
from tests.support.bombs import deflate_bomb
from tests.support.codec_plugin import faulty
from tests.support.dicom_files import ENHANCED_CT, PREPROCESSING, SAMPLES, VOCABULARY, made, real

MEMORY_MB = 1024


@pytest.fixture
def codecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faulty codec on the path of the children that this process starts."""
    codec_plugin.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(PREPROCESSING, VOCABULARY, MEMORY_MB, 20.0) as shared:
        yield shared


def pid_of(decoder: Decoder) -> int:
    assert decoder.pid is not None
    return decoder.pid


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_RLE.dcm",
        "examples_rgb_color.dcm",
        "examples_ybr_color.dcm",
        "JPEG2000.dcm",
        "image_dfl.dcm",
    ],
)
def test_the_child_reads_what_the_parent_would(decoder: Decoder, name: str) -> None:
    here, there = read_instance(real(name), PREPROCESSING, VOCABULARY), decoder.read(real(name))
    assert there.tags == here.tags
    assert [(f.number, f.low, f.high) for f in there.frames] == [(f.number, f.low, f.high) for f in here.frames]
    for ours, theirs in zip(here.frames, there.frames, strict=True):
        assert theirs.pixels.dtype == np.uint8
        assert np.array_equal(ours.pixels, theirs.pixels)


def test_many_frames_come_back_in_order(decoder: Decoder) -> None:
    steps = np.arange(8, dtype=np.int16)[:, None, None] * 10
    values = np.broadcast_to(steps, (8, 16, 16)).astype(np.int16)
    frames = decoder.read(made(values, SOPClassUID=ENHANCED_CT, RescaleSlope=1, RescaleIntercept=0)).frames
    assert [frame.number for frame in frames] == list(range(8))
    assert [int(frame.pixels.max()) for frame in frames] == [round(255 * (160 + 10 * n) / 400) for n in range(8)]


def test_reasons_come_back_and_the_child_stays(decoder: Decoder) -> None:
    decoder.read(real("CT_small.dcm"))
    first = pid_of(decoder)
    with pytest.raises(NotAnImage) as no_image:
        decoder.read(real("rtplan.dcm"))
    assert no_image.value.reason == Reason.NOT_IMAGE_CLASS
    with pytest.raises(Rejected) as rejected:
        decoder.read(real("CT_small.dcm")[:-5000])
    assert (rejected.value.reason, rejected.value.detail) == (Reason.TRUNCATED, "it ends in PixelData")
    with pytest.raises(Rejected) as empty:
        decoder.read(b"")
    assert empty.value.reason == Reason.EMPTY
    assert pid_of(decoder) == first


@pytest.mark.parametrize(
    ("fault", "reasons", "replaced"),
    [
        ("segfault", {Reason.CRASHED}, True),
        ("abort", {Reason.CRASHED}, True),
        ("exit", {Reason.CRASHED}, True),
        ("hang", {Reason.TIMEOUT}, True),
        ("stop", {Reason.TIMEOUT}, True),
        ("sys.exit", {Reason.CRASHED}, False),
        ("interrupt", {Reason.CRASHED}, False),
        ("panic", {Reason.UNDECODABLE}, False),
        ("memory", {Reason.UNDECODABLE, Reason.TOO_LARGE}, None),
        ("noise", {Reason.UNDECODABLE}, False),
    ],
)
@pytest.mark.usefixtures("codecs")
def test_a_dying_codec_costs_one_file(fault: str, reasons: set[Reason], replaced: bool | None) -> None:
    before = read_instance(real("MR_small_RLE.dcm"), PREPROCESSING, VOCABULARY).frames[0].pixels
    # A short limit for what hangs alone: filling the memory takes a busy machine some seconds.
    with Decoder(PREPROCESSING, VOCABULARY, MEMORY_MB, 2.0 if Reason.TIMEOUT in reasons else 20.0) as decoder:
        assert np.array_equal(decoder.read(real("MR_small_RLE.dcm")).frames[0].pixels, before)
        first = pid_of(decoder)
        started = time.monotonic()
        with pytest.raises(Rejected) as error:
            decoder.read(faulty(fault))
        assert error.value.reason in reasons
        assert time.monotonic() - started < 25
        assert np.array_equal(decoder.read(real("MR_small_RLE.dcm")).frames[0].pixels, before)
        if replaced is not None:
            assert (pid_of(decoder) != first) == replaced
        assert alive(first) == (pid_of(decoder) == first)
        last = pid_of(decoder)
    assert not alive(last)


def test_a_bomb_is_rejected_at_the_bound() -> None:
    with Decoder(PREPROCESSING, VOCABULARY, 2048, 20.0) as decoder:
        decoder.read(real("CT_small.dcm"))
        first = pid_of(decoder)
        with pytest.raises(Rejected) as error:
            decoder.read(deflate_bomb())
        assert error.value.reason == Reason.TOO_LARGE
        assert pid_of(decoder) == first
        status = dict(line.split(":", 1) for line in Path(f"/proc/{first}/status").read_text().splitlines())
        assert int(status["VmHWM"].split()[0]) < 1400 * 1024


def test_an_object_larger_than_the_child_s_memory_is_refused() -> None:
    with Decoder(PREPROCESSING, VOCABULARY, 512, 20.0) as decoder:
        with pytest.raises(Rejected) as error:
            decoder.read(bytes(600 * 2**20))
        assert error.value.reason == Reason.TOO_LARGE
        assert decoder.read(real("CT_small.dcm")).frames


@pytest.mark.parametrize("name", ["", "J2K_pixelrep_mismatch.dcm"])
def test_memory_that_others_leaked_costs_no_file(decoder: Decoder, name: str) -> None:
    """A file is not rejected for memory that earlier ones leaked: a fresh child reads it again."""
    decoder.close()
    decoder.read(real("CT_small.dcm"))
    first = pid_of(decoder)
    # As a leak would do it: nothing is left between what the child uses and its limit.
    used = int(Path(f"/proc/{first}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(first, resource.RLIMIT_AS, (used, used))
    assert decoder.read(real(name) if name else made(np.zeros((4500, 4500), np.uint16), Modality="MR")).frames
    assert pid_of(decoder) != first


def test_a_child_is_renewed_after_many_files(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_decoder, "FILES_PER_CHILD", 3)
    decoder.close()
    pids = []
    for _ in range(7):
        decoder.read(real("CT_small.dcm"))
        pids.append(pid_of(decoder))
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]


def test_a_child_killed_between_files_costs_none(decoder: Decoder) -> None:
    decoder.read(real("CT_small.dcm"))
    os.kill(pid_of(decoder), signal.SIGKILL)
    assert decoder.read(real("MR_small.dcm")).frames


def test_the_child_gets_no_secrets_and_its_limits(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CBMIR_PRIVACY__KEY", "geheim4711")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim4711")
    decoder.close()
    decoder.read(real("CT_small.dcm"))
    assert b"geheim4711" not in Path(f"/proc/{pid_of(decoder)}/environ").read_bytes()
    limits = Path(f"/proc/{pid_of(decoder)}/limits").read_text()
    row = {line[:26].strip(): line[26:].split() for line in limits.splitlines()}
    assert row["Max core file size"][:2] == ["0", "0"]
    assert row["Max address space"][0] == str(MEMORY_MB * 2**20)


def test_the_child_ends_with_its_parent() -> None:
    script = """
        import os
        from cbmir_spark.dicom.decoder import Decoder
        from tests.support.dicom_files import PREPROCESSING, VOCABULARY, real
        decoder = Decoder(PREPROCESSING, VOCABULARY, 1024, 20.0)
        decoder.read(real("CT_small.dcm"))
        os.write(1, str(decoder.pid).encode())
        os._exit(9)
    """
    parent = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=False, timeout=60
    )
    assert parent.returncode == 9, parent.stderr
    pid = int(parent.stdout)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_child_that_cannot_start_is_the_machine_s_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pydicom.py").write_text("raise ImportError('no pydicom here')")
    monkeypatch.syspath_prepend(tmp_path)
    broken = Decoder(PREPROCESSING, VOCABULARY, MEMORY_MB, 20.0)
    with broken, pytest.raises(EnvironmentProblem, match="no pydicom here"):
        broken.read(real("CT_small.dcm"))


def test_the_child_imports_only_what_it_needs() -> None:
    """Every worker pays for its start: it imports neither Spark nor torch nor the settings."""
    heavy = {"pyspark", "torch", "mlflow", "pydantic", "pandas", "pyarrow", "petastorm", "delta", "scipy"}
    script = f"import sys, cbmir_spark.dicom.decoder; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_mutants_of_real_files_give_a_picture_or_a_reason() -> None:
    """Flipped bits and spliced blocks, GDCM's own aborts among them: nothing is INTERNAL, nothing hangs."""
    source = random.Random(20)
    outcomes: Counter[str] = Counter()
    with Decoder(PREPROCESSING, VOCABULARY, MEMORY_MB, 20.0) as decoder:
        for name in SAMPLES:
            for _ in range(15):
                mutant = bytearray(real(name))
                for _ in range(source.choice((1, 3, 20))):
                    mutant[source.randrange(132, len(mutant))] ^= 1 << source.randrange(8)
                if source.random() < 0.3:
                    at, length = source.randrange(132, len(mutant)), source.randrange(1, 200)
                    mutant[at : at + length] = real(source.choice(SAMPLES))[-length:]
                try:
                    decoder.read(bytes(mutant))
                    outcomes["read"] += 1
                except (NotAnImage, Rejected) as error:
                    outcomes[error.reason] += 1
                    assert error.reason != Reason.INTERNAL, f"{name}: {error}"
    assert outcomes["read"] > 50
    assert outcomes[Reason.TIMEOUT] == 0
    assert sum(outcomes.values()) - outcomes["read"] > 50
