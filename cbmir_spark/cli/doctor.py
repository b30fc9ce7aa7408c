"""Find what this machine and these settings lack before a job does: one line per check."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pyspark
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cbmir_spark import extras, storage
from cbmir_spark.config import Settings
from cbmir_spark.errors import CbmirError, EnvironmentProblem, InputError
from cbmir_spark.lake import pseudonyms
from cbmir_spark.lake.open import check_roots, has_tables, locate
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.spark import session
from cbmir_spark.storage import ObjectStore

SYNTAXES = (
    ExplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEG2000Lossless,
    JPEG2000,
)
FREE_GIB = 5
_NAMED = ("delta-spark", "pyarrow", "numpy", "pandas", "pydicom")


@dataclass(frozen=True)
class Check:
    """One check: what was found, or what is wrong and what to do."""

    name: str
    ok: bool
    found: str


def run(settings: Settings) -> list[Check]:
    """Run every check; none changes anything. Runs on the driver, without Spark."""
    return [
        _check(name, look)
        for name, look in (
            ("Python", _python),
            ("Java", session.check_java),
            ("Spark", _spark),
            ("Delta's jars", _jars),
            ("Packages", _packages),
            ("Extras", _extras),
            ("Decoders", _decoders),
            ("Lake", lambda: _lake(settings)),
            ("Archive", lambda: _archive(settings)),
            ("Pseudonym key", lambda: _key(settings)),
            ("MLflow", lambda: _mlflow(settings)),
        )
    ]


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (CbmirError, OSError) as error:
        return Check(name, False, str(error))


def _python() -> str:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] != (3, 11):
        raise EnvironmentProblem(f"Python {version} cannot run the pinned packages: use Python 3.11")
    return version


def _spark() -> str:
    home = session.spark_home()
    if not (home / "jars").is_dir():
        raise EnvironmentProblem(f"{home} is no Spark: set SPARK_HOME to one, or unset it to use that of pyspark")
    return f"{pyspark.__version__} at {home}"


def _jars() -> str:
    if session.has_delta_jars():
        return "in Spark's folder"
    return "not in Spark's folder: resolved at each start; deploy/fetch_jars.py puts them there once"


def _packages() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in _NAMED)


def _version(package: str) -> str:
    """The version of a package; a managed runtime may bring it without its metadata."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _extras() -> str:
    found = {extra: extras.missing(extra) for extra in extras.PACKAGES}
    return ", ".join(
        f"[{extra}] is there" if not names else f"[{extra}] lacks {' and '.join(names)}"
        for extra, names in found.items()
    )


def _decoders() -> str:
    missing = [uid.name for uid in SYNTAXES if not get_decoder(uid).is_available]
    if missing:
        raise EnvironmentProblem(f"no decoder for {', '.join(missing)}: install the package's dependencies again")
    return f"decoders found for all {len(SYNTAXES)} transfer syntaxes"


def _lake(settings: Settings) -> str:
    lake, store = locate(settings)
    check_roots(lake, store)
    found = store.kind(lake.uri)
    if not lake.is_local:
        return f"{lake.uri}: {'reachable' if found == 'folder' else 'does not exist yet'}"
    path = storage.local_path(lake.uri)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise InputError(f"{path} is a file: give a lake elsewhere, with --lake")
    if not os.access(path, os.W_OK):
        raise InputError(f"{path} is not writable: give a lake elsewhere, with --lake")
    free = shutil.disk_usage(path).free / 2**30
    if free < FREE_GIB:
        raise EnvironmentProblem(f"only {free:.1f} GiB are free at {path}: at least {FREE_GIB} GiB are needed")
    return f"{lake.uri}: {'exists' if found == 'folder' else 'does not exist yet'}, {free:.0f} GiB free"


def _archive(settings: Settings) -> str:
    if settings.ingest.archive is None:
        return "not set (--archive, or ingest.archive)"
    archive = storage.canonical(settings.ingest.archive)
    if ObjectStore(settings.storage).kind(archive) != "folder":
        raise InputError(f"{archive} is not an existing folder: give the folder or prefix of the .dcm objects")
    return archive


def _key(settings: Settings) -> str:
    lake, store = locate(settings)
    folder = lake.vault_folder
    if (
        not pseudonyms.is_configured(settings.privacy)
        and folder is not None
        and not os.path.exists(os.path.join(folder, pseudonyms.KEY_FILE))
        and not has_tables(lake, store)
    ):
        return "none yet: the first ingest generates one in the lake's vault"
    return f"key id {pseudonyms.load(settings.privacy, folder).key_id}"


def _mlflow(settings: Settings) -> str:
    from cbmir_spark.models.tracking import Tracking

    return Tracking.of(settings.mlflow, settings.storage, LakePaths.of(settings.lake).uri).uri
