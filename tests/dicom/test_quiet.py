"""No tag value reaches anybody's log, warnings or messages, and nothing changes for anybody else."""

import logging
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from cbmir_spark.dicom.quiet import quiet
from cbmir_spark.dicom.read import Rejected, decode_frames, picture
from tests.support.dicom_files import TINY, header, made, read, real

SECRET = "GEHEIM"


def pydicom_loggers() -> list[logging.Logger]:
    known = logging.root.manager.loggerDict.items()
    found = [each for name, each in known if name.partition(".")[0] == "pydicom" and isinstance(each, logging.Logger)]
    assert len(found) >= 4
    return found


@pytest.fixture
def talkative(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Every logger of pydicom at its most talkative, as somebody who looks for a fault sets them."""
    caplog.set_level(0)
    for logger in pydicom_loggers():
        caplog.set_level(logging.DEBUG, logger.name)
    return caplog


@pytest.mark.filterwarnings("ignore:.*Invalid value.*")
def test_messages_and_logs_carry_no_tag_values(
    talkative: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    content = made(TINY, PatientID="GEHEIM4711", SOPInstanceUID="4711.geheim.", PatientAge="GEHEIM", Modality="MR")
    talkative.clear()
    with pytest.raises(Rejected) as error:
        read(content)
    assert SECRET not in repr(error.value).upper()
    assert SECRET not in talkative.text.upper()
    assert SECRET not in "".join(capfd.readouterr()).upper()


@pytest.mark.parametrize(
    "reader", [read, lambda content: picture(content, 0), lambda content: list(decode_frames(content))]
)
def test_each_way_to_read_is_quiet_where_pydicom_is_not(
    talkative: pytest.LogCaptureFixture, reader: Callable[[bytes], object]
) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        content = made(TINY, Modality="MR", PatientName="A^B", SpecificCharacterSet=SECRET)
        talkative.clear()
        warned.clear()
        _ = header(content).PatientName
        assert SECRET in talkative.text
        assert SECRET in "".join(str(warning.message) for warning in warned)
        talkative.clear()
        warned.clear()
        reader(content)
        assert talkative.text == ""
        assert warned == []


@pytest.mark.parametrize("name", ["MR_small_padded.dcm", "JPGExtended.dcm"])
def test_decoding_is_quiet_too(talkative: pytest.LogCaptureFixture, name: str) -> None:
    """pydicom warns of padding behind the pixels, and logs an error for each codec that refuses a frame."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        content = real(name)
        with suppress(RuntimeError):
            _ = header(content).pixel_array
        assert talkative.text != ""
        talkative.clear()
        warned.clear()
        assert len(list(decode_frames(content))) == 1
        assert talkative.text == ""
        assert warned == []


def test_records_and_warnings_are_dropped_within_the_block_alone(talkative: pytest.LogCaptureFixture) -> None:
    for logger in pydicom_loggers():
        with quiet():
            logger.critical(SECRET)
            warnings.warn(SECRET, stacklevel=1)
        assert talkative.text == "", logger.name
        logger.critical("heard again")
        assert "heard again" in talkative.text, logger.name
        talkative.clear()
    with pytest.warns(UserWarning, match="heard again"):
        warnings.warn("heard again", stacklevel=1)


def test_the_block_restores_after_an_error_and_within_another(talkative: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("pydicom")
    filters = list(logger.filters)
    with pytest.raises(ValueError, match="broken"), quiet():
        with quiet():
            pass
        logger.critical(SECRET)
        raise ValueError("broken")
    assert talkative.text == ""
    assert logger.filters == filters


def test_importing_the_package_changes_nobody_s_logger_and_no_warnings_filter() -> None:
    script = """
        import importlib, logging, pkgutil, warnings
        import PIL.Image, numpy, pydicom, pydicom.encaps, pydicom.filereader, pydicom.pixels.decoders.base

        def state():
            names = [name for name in sorted(logging.root.manager.loggerDict) if not name.startswith("cbmir_spark")]
            loggers = [logging.root, *map(logging.getLogger, names)]
            return list(warnings.filters), logging.root.manager.disable, [
                (logger.name, logger.level, logger.disabled, logger.propagate, *logger.handlers, *logger.filters)
                for logger in loggers
            ]

        before = state()
        import cbmir_spark.dicom
        names = [module.name for module in pkgutil.iter_modules(cbmir_spark.dicom.__path__)]
        for name in names:
            importlib.import_module(f"cbmir_spark.dicom.{name}")
        assert len(names) > 10, names
        assert state() == before
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
