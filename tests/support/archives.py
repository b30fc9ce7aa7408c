"""Archives of pydicom's own small files, for tests that ingest."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pydicom
from pydicom.config import disable_value_validation
from pydicom.data import get_testdata_file
from pydicom.uid import UID

NIGHT = datetime(2026, 1, 1, tzinfo=UTC)


def at(hours: int) -> datetime:
    """A moment of one night."""
    return NIGHT + timedelta(hours=hours)


def sample(folder: Path, name: str, source: str = "CT_small.dcm", hour: int = 0, **changes: str) -> Path:
    """Write a real test file of pydicom below `folder`, with tags changed, as if it were written at `hour`."""
    ds = pydicom.dcmread(str(get_testdata_file(source)))
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with disable_value_validation():
        for keyword, value in changes.items():
            setattr(ds, keyword, value)
            if keyword == "SOPInstanceUID":
                ds.file_meta.MediaStorageSOPInstanceUID = UID(value)
        ds.save_as(path)
    os.utime(path, (at(hour).timestamp(),) * 2)
    return path
