"""The demo archive: drawn phantoms, pydicom's real test files, duplicates, a conflict and broken files; no Spark.

Runs on the driver and writes local files. A seed gives the same bytes each time.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom.data

from cbmir_spark.errors import InputError
from cbmir_spark.synthetic import scanners
from cbmir_spark.synthetic.canvas import PhantomClass, Subject
from cbmir_spark.synthetic.encode import as_bytes
from cbmir_spark.synthetic.names import uid_of
from cbmir_spark.synthetic.phantoms import CLASSES

__all__ = ["README", "Archive", "write_demo_archive"]

README = "README.txt"


@dataclass(frozen=True)
class Archive:
    """The contents of a demo archive; `created` is False where `write_demo_archive` found it complete."""

    folder: Path
    created: bool
    files: int
    phantoms: int
    classes: tuple[str, ...]


def write_demo_archive(
    folder: str | Path, images_per_class: int, seed: int, classes: Sequence[PhantomClass] = CLASSES
) -> Archive:
    """Write a demo archive into `folder`, which appears complete or not at all.

    Does nothing where the folder already is a demo archive of the same size, seed and classes. Raises InputError where
    it is anything else, unless it is empty.
    """
    target = Path(folder)
    readme = _readme(images_per_class, seed, classes)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        try:
            found = (target / README).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise InputError(f"{target} exists and is not a demo archive: choose another folder") from None
        if found != readme:
            raise InputError(f"{target} is a demo archive of another size or seed: remove it, or choose another folder")
        return _archive(target, classes, created=False)

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        phantoms = list(_write_phantoms(unfinished, images_per_class, seed, classes))
        _write_companions(unfinished, seed)
        _write_duplicates(unfinished / "duplicates", phantoms)
        _write_conflict(unfinished / "conflicts", seed)
        _write_broken(unfinished / "broken", seed)
        _copy_pydicom_files(unfinished / "pydicom")
        (unfinished / README).write_text(readme, encoding="utf-8")
        unfinished.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return _archive(target, classes, created=True)


def _readme(images_per_class: int, seed: int, classes: Sequence[PhantomClass]) -> str:
    text = (
        "SYNTHETIC demo archive of cbmir_spark.\n"
        "phantoms/, duplicates/, conflicts/, broken/: drawn by a program; no patient, no scanner.\n"
        "pydicom/: the test files of the pydicom package, unchanged.\n"
        f"images per class: {images_per_class}\nseed: {seed}\n"
    )
    return text if tuple(classes) == CLASSES else f"{text}classes: {', '.join(each.label for each in classes)}\n"


def _archive(folder: Path, classes: Sequence[PhantomClass], created: bool) -> Archive:
    files = sum(path.is_file() for path in folder.rglob("*"))
    phantoms = sum(path.is_file() for path in (folder / "phantoms").rglob("*"))
    return Archive(folder, created, files, phantoms, tuple(each.label for each in classes))


def _write_phantoms(folder: Path, images_per_class: int, seed: int, classes: Sequence[PhantomClass]) -> Iterator[Path]:
    for position, kind in enumerate(classes):
        patients = max(4, images_per_class // 3)
        for number in range(patients):
            subject = Subject(kind, number, seed)
            # Each patient has another scanner, and so another transfer syntax and pixel format.
            scanner = position + number
            images = range(number, images_per_class, patients)
            for place, image in enumerate(images):
                series = 1 + (place * 2) // max(len(images), 2)
                level = -0.8 + 1.6 * (place + 0.5) / len(images)
                dataset, syntax = scanners.phantom(subject, series, place, level, image, scanner)
                # Real archives name their objects in any way: every third scanner omits the suffix.
                name = f"IM{place + 1:04d}" + ("" if scanner % 3 == 2 else ".dcm")
                path = folder / "phantoms" / subject.patient_id / f"SE{series:02d}" / name
                _write(path, as_bytes(dataset, syntax))
                yield path


def _write_companions(folder: Path, seed: int) -> None:
    """Write a localizer and a dose screen of the first CT patient."""
    subject = Subject(CLASSES[0], 0, seed)
    for series, draw in (("SE08", scanners.localizer), ("SE09", scanners.dose_screen)):
        path = folder / "phantoms" / subject.patient_id / series / "IM0001.dcm"
        _write(path, as_bytes(draw(subject), scanners.NATIVE[0]))


def _write_duplicates(folder: Path, phantoms: Sequence[Path]) -> None:
    for number, source in enumerate(phantoms[:: max(1, len(phantoms) // 3)][:3]):
        _write(folder / f"copy{number}.dcm", source.read_bytes())


def _write_conflict(folder: Path, seed: int) -> None:
    """Write two images that have one SOP Instance UID."""
    subject = Subject(CLASSES[1], 0, seed)
    for name, level, image in (("first", -0.5, 900), ("second", 0.5, 901)):
        ds, syntax = scanners.phantom(subject, 1, 0, level, image, scanner=1)
        ds.SOPInstanceUID = uid_of(seed, "conflict")
        _write(folder / f"{name}.dcm", as_bytes(ds, syntax))


def _write_broken(folder: Path, seed: int) -> None:
    """Write files that ingest has to reject or to recognize as something else."""
    subject = Subject(CLASSES[1], 0, seed)
    native = scanners.NATIVE[0]
    whole = as_bytes(scanners.phantom(subject, 1, 0, 0.0, 902, scanner=1)[0], native)
    _write(folder / "truncated.dcm", whole[: len(whole) * 3 // 5])
    _write(folder / "empty.dcm", b"")
    _write(folder / "letter.dcm", b"Dear colleague, please find the images attached.\n")
    _write(folder / "zeros.dcm", b"\0" * 4096)
    liar = scanners.phantom(subject, 1, 0, 0.0, 903, scanner=1)[0]
    liar.SOPInstanceUID = uid_of(seed, "lying dimensions")
    liar.Rows = liar.Columns = 60000
    _write(folder / "lying_dimensions.dcm", as_bytes(liar, native))
    nameless = scanners.phantom(subject, 1, 0, 0.0, 904, scanner=1)[0]
    # pydicom does not write a file without the element, so its value is made invalid.
    name = nameless.SOPInstanceUID.encode()
    _write(folder / "invalid_uid.dcm", as_bytes(nameless, native).replace(name, b"x" * len(name)))


def _copy_pydicom_files(folder: Path) -> None:
    """Copy pydicom's test files, real and broken ones, as far as the installed package has them."""
    source = Path(pydicom.data.__file__).parent / "test_files"
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            _write(folder / path.relative_to(source), path.read_bytes())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
