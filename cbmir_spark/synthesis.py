"""Archives to try the jobs on: phantoms drawn here, and real pictures wrapped as DICOM. pydicom and numpy, no Spark.

Everything runs on the driver and writes local files. A seed gives the same bytes each time: names, UIDs, anatomy and
noise come from hashes and seeded generators, never from the clock.
"""

import csv
import hashlib
import io
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
import pydicom.data
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as DicomSequence

from cbmir_spark import vocabulary
from cbmir_spark.errors import InputError

# Single precision: drawing is most of the time an archive takes, and no phantom has more than 16 bits.
Plane = NDArray[np.float32]

README = "README.txt"
LABEL_COLUMNS = ("file", "modality", "body_part", "group", "source_id", "dataset", "licence")

_MANUFACTURER = "cbmir_spark phantom"
# PS3.5 6.2: the longest value of a CS, LO and ST.
_CS, _LO, _ST = 16, 64, 1024


@dataclass(frozen=True)
class Archive:
    """What a folder holds after `write_demo_archive`; `created` is False where it was there before."""

    folder: Path
    created: bool
    files: int
    phantoms: int
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Wrapped:
    """What `wrap_pictures` did: files in the folder, how many of them are new, and images by modality/body part."""

    folder: Path
    files: int
    written: int
    classes: Mapping[str, int]


@dataclass(frozen=True)
class _Subject:
    """One made-up patient of one class: identity, and the bends that make its anatomy its own."""

    kind: "_Class"
    number: int
    seed: int

    @property
    def patient_id(self) -> str:
        return f"SYN-{self.kind.modality}-{self.kind.body_part}-{self.number:03d}"

    def rng(self, *purpose: object) -> np.random.Generator:
        return _rng(self.seed, self.patient_id, *purpose)


@dataclass(frozen=True)
class _Class:
    """A modality and body part of the demo archive, other spellings of it, and how to draw it."""

    modality: str
    body_part: str
    spellings: tuple[str, ...]
    description: str
    shape: tuple[int, int]
    draw: Callable[["_Canvas"], Plane]

    @property
    def label(self) -> str:
        return f"{self.modality}/{self.body_part}"


class _Canvas:
    """A bent coordinate grid, in -1…1 both ways, on which a phantom is drawn.

    The bend is one patient's anatomy; `level` (-1…1) is where in the body this image lies; `noise` differs in each.
    """

    def __init__(self, shape: tuple[int, int], subject: _Subject, level: float, image: int) -> None:
        self.shape = shape
        self.level = level
        self.body = subject.rng("body")
        self.noise_source = subject.rng("noise", image)
        y, x = _grid(shape)
        bend = subject.rng("bend")
        for _ in range(4):
            fx, fy = bend.uniform(0.5, 2.6, 2)
            px, py = bend.uniform(0, 2 * np.pi, 2)
            strength = bend.uniform(0.0, 0.035, 2)
            x = x + strength[0] * np.sin(np.pi * (fy * y + 0.4 * level) + px)
            y = y + strength[1] * np.sin(np.pi * (fx * x - 0.4 * level) + py)
        turn = bend.normal(0, 0.06)
        scale = bend.uniform(0.93, 1.1, 2)
        shift = bend.normal(0, 0.035, 2)
        self.x: Plane = (x * np.cos(turn) - y * np.sin(turn)) * scale[0] + shift[0]
        self.y: Plane = (x * np.sin(turn) + y * np.cos(turn)) * scale[1] + shift[1]

    def vary(self, value: float, share: float = 0.12) -> float:
        """`value` as this patient has it."""
        return value * float(self.body.uniform(1 - share, 1 + share))

    def filled(self, value: float) -> Plane:
        return np.full(self.shape, value, np.float32)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, turn: float = 0.0, soft: float = 0.03) -> Plane:
        """1 inside, 0 outside, with an edge of width `soft`."""
        dx, dy = self.x - cx, self.y - cy
        u = (dx * np.cos(turn) + dy * np.sin(turn)) / max(rx, 1e-3)
        v = (dy * np.cos(turn) - dx * np.sin(turn)) / max(ry, 1e-3)
        return _step((1.0 - np.hypot(u, v)) * min(rx, ry), soft)

    def bar(self, x0: float, y0: float, x1: float, y1: float, width: float, soft: float = 0.02) -> Plane:
        """A rod with round ends from one point to another."""
        length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-9)
        along = np.clip(((self.x - x0) * (x1 - x0) + (self.y - y0) * (y1 - y0)) / length, 0, 1)
        gap = np.hypot(self.x - x0 - along * (x1 - x0), self.y - y0 - along * (y1 - y0))
        return _step(width - gap, soft)

    def texture(self, grain: float, of_body: bool = True) -> Plane:
        """Smooth noise of unit variance; `grain` is the width of its blobs in pixels."""
        source = self.body if of_body else self.noise_source
        return _smooth_noise(self.shape, grain, source)

    def noise(self, strength: float) -> Plane:
        return self.noise_source.standard_normal(self.shape, dtype=np.float32) * np.float32(strength)


def write_demo_archive(folder: str | Path, images_per_class: int, seed: int) -> Archive:
    """An archive of phantoms, real test files of pydicom, duplicates, a conflict and broken files below `folder`.

    Phantoms are ellipses and textures, said to be SYNTHETIC in their tags. The folder appears whole or not at all;
    one that is there already with the same figures is left as it is. Raises InputError where the folder holds
    something else.
    """
    target = Path(folder)
    readme = _readme(images_per_class, seed)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        try:
            found = (target / README).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise InputError(f"{target} is not a demo archive: choose another folder") from None
        if found != readme:
            raise InputError(f"{target} holds another demo archive: remove it or choose another folder")
        return _archive(target, created=False)

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        phantoms = list(_write_phantoms(unfinished, images_per_class, seed))
        _write_companions(unfinished, seed)
        _write_troubles(unfinished, phantoms, seed)
        _copy_pydicom_files(unfinished / "pydicom")
        (unfinished / README).write_text(readme, encoding="utf-8")
        unfinished.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return _archive(target, created=True)


def wrap_pictures(labels_csv: str | Path, images_folder: str | Path, out_folder: str | Path) -> Wrapped:
    """The pictures that a labels.csv names, as Secondary Capture files (PS3.3 A.8.1): real pixels, label-derived tags.

    The columns are LABEL_COLUMNS; `file` lies below `images_folder`. UIDs are version 5 UUIDs (PS3.5 B.2) of its name
    and content, so that they are the same each time and two sets with equal names stay apart. PatientID is `group`,
    or a digest of the picture where that is empty; a patient has one study, and one series for each label. Nothing is
    invented: sex, age, dates and acquisition stay empty. A file that is there with the same content is left alone.
    Raises InputError naming the row before anything is written where a column, a picture or a value is wrong.
    """
    pictures = _read_labels(Path(labels_csv), Path(images_folder))
    out = Path(out_folder)
    written = 0
    for picture in pictures:
        content = _as_bytes(_secondary_capture(picture), uid.ExplicitVRLittleEndian)
        written += _write_if_new(out / picture.target, content)
    classes = Counter(f"{p.modality}/{p.body_part}" for p in pictures)
    return Wrapped(out, len(pictures), written, dict(sorted(classes.items())))


# --- phantoms: one function a class, array in stored or physical units out ---


def _ct_chest(c: _Canvas) -> Plane:
    body = c.ellipse(0, 0, c.vary(0.86, 0.05), c.vary(0.62, 0.08))
    inner = c.ellipse(0, 0, c.vary(0.78, 0.04), c.vary(0.54, 0.06))
    hu = _paint(c.filled(-1000), body, -95 + 12 * c.texture(6))
    hu = _paint(hu, inner, 45 + 8 * c.texture(5))
    vessels = np.clip(c.texture(2.2), 1.1, 3) - 1.1
    lung = -860 + 330 * vessels + 25 * c.texture(9)
    height = 1 - 0.25 * c.level
    for side in (-1, 1):
        rx = c.vary(0.29) * (0.9 if side > 0 else 1.0)
        hu = _paint(hu, c.ellipse(side * 0.4, 0.02, rx, c.vary(0.42) * height, side * 0.12), lung)
    heart = c.ellipse(0.12, -0.08, c.vary(0.26, 0.2) * (0.85 + 0.3 * c.level), c.vary(0.22, 0.2), 0.5)
    hu = _paint(hu, heart, 48 + 90 * (c.body.random() < 0.4) + 6 * c.texture(7))
    hu = _paint(hu, c.ellipse(0.08, 0.24, 0.06, 0.06), 60 + 110 * (c.body.random() < 0.4))
    for angle in np.linspace(0, 2 * np.pi, 14, endpoint=False) + 0.22 * c.level:
        rib = c.ellipse(0.79 * np.cos(angle), 0.56 * np.sin(angle), 0.07, 0.03, angle + np.pi / 2)
        hu = _paint(hu, rib, 520)
    return _paint(_spine(hu, c, 0.42), _table(c), -400) + c.noise(c.vary(22, 0.4))


def _ct_abdomen(c: _Canvas) -> Plane:
    body = c.ellipse(0, 0, c.vary(0.84, 0.06), c.vary(0.6, 0.1))
    inner = c.ellipse(0, 0, c.vary(0.72, 0.06), c.vary(0.5, 0.08))
    contrast = 55.0 if c.body.random() < 0.5 else 0.0
    hu = _paint(c.filled(-1000), body, -105 + 10 * c.texture(6))
    hu = _paint(hu, inner, -40 + 45 * np.clip(c.texture(11), -1, 1.5))
    liver = c.ellipse(-0.36, -0.12, c.vary(0.36), c.vary(0.32) * (1 - 0.3 * c.level), 0.4)
    hu = _paint(hu, liver, 58 + contrast + 7 * c.texture(4))
    hu = _paint(hu, c.ellipse(0.5, -0.02, c.vary(0.15), c.vary(0.24), -0.3), 52 + contrast)
    hu = _paint(hu, c.ellipse(0.18, -0.2, c.vary(0.2), c.vary(0.14)), 20 + 15 * c.texture(5))
    for side in (-1, 1):
        hu = _paint(hu, c.ellipse(side * 0.38, 0.22, c.vary(0.13), c.vary(0.17), side * 0.5), 35 + 2.2 * contrast)
        hu = _paint(hu, c.ellipse(side * 0.37, 0.22, 0.05, 0.07), -40 + contrast)
    for _ in range(5):
        x, y = c.body.uniform(-0.35, 0.45), c.body.uniform(-0.4, 0.05)
        hu = _paint(
            hu, c.ellipse(x, y + 0.06 * c.level, c.vary(0.06, 0.4), 0.045), -750 + 700 * (c.body.random() < 0.5)
        )
    hu = _paint(hu, c.ellipse(0.05, 0.2, 0.06, 0.06), 45 + 2 * contrast)
    return _paint(_spine(hu, c, 0.36), _table(c), -400) + c.noise(c.vary(16, 0.4))


def _ct_head(c: _Canvas) -> Plane:
    size = 1 - 0.18 * abs(c.level)
    rx, ry = c.vary(0.6, 0.05) * size, c.vary(0.74, 0.05) * size
    hu = _paint(c.filled(-1000), c.ellipse(0, 0, rx + 0.07, ry + 0.07), 20)
    hu = _paint(hu, c.ellipse(0, 0, rx, ry, soft=0.015), c.vary(1050, 0.15))
    brain = c.ellipse(0, 0, rx - 0.08, ry - 0.08, soft=0.015)
    gyri = np.clip(c.texture(3.2), -1.5, 1.5)
    hu = _paint(hu, brain, 34 + 3.5 * gyri)
    rim = brain - c.ellipse(0, 0, rx - 0.16, ry - 0.16)
    hu = _paint(hu, np.clip(rim, 0, 1) * _step(gyri - 0.8, 0.1), 8)
    wide = c.vary(0.09, 0.5) * (1 - 0.5 * abs(c.level))
    for side in (-1, 1):
        hu = _paint(hu, c.ellipse(side * 0.13, -0.12, wide, 0.22, side * 0.35), 6)
        hu = _paint(hu, c.ellipse(side * 0.17, 0.18, wide * 0.8, 0.16, -side * 0.5), 6)
    hu = _paint(hu, c.bar(0, -ry + 0.1, 0, ry - 0.1, 0.008), 60)
    if c.body.random() < 0.25:
        hu = _paint(hu, c.ellipse(c.body.uniform(-0.35, 0.35), c.body.uniform(-0.4, 0.4), 0.1, 0.12), 68)
    return hu + c.noise(c.vary(5, 0.4))


def _mr_brain(c: _Canvas) -> Plane:
    size = 1 - 0.18 * abs(c.level)
    rx, ry = c.vary(0.58, 0.05) * size, c.vary(0.72, 0.05) * size
    t2 = c.body.random() < 0.5
    white, gray, fluid = (0.34, 0.52, 1.0) if t2 else (0.78, 0.56, 0.12)
    signal = _paint(c.filled(0), c.ellipse(0, 0, rx + 0.12, ry + 0.12), 0.85 if not t2 else 0.6)
    signal = _paint(signal, c.ellipse(0, 0, rx + 0.05, ry + 0.05), 0.06)
    signal = _paint(signal, c.ellipse(0, 0, rx, ry), fluid)
    fold = 0.05 * np.clip(c.texture(4.5), -1.6, 1.6)
    radius = np.hypot(c.x / rx, c.y / ry)
    signal = _paint(signal, _step(0.95 + fold - radius, 0.03), gray)
    signal = _paint(signal, _step(0.82 + 1.9 * fold - radius, 0.03), white)
    wide = c.vary(0.08, 0.4)
    for side in (-1, 1):
        signal = _paint(signal, c.ellipse(side * 0.12, -0.1, wide, 0.22, side * 0.35), fluid)
        signal = _paint(signal, c.ellipse(side * 0.2, 0.08, 0.09, 0.13, side * 0.2), gray)
    signal = _paint(signal, c.bar(0, -ry * 0.95, 0, ry * 0.95, 0.012), fluid)
    return _magnitude(signal, c)


def _mr_knee(c: _Canvas) -> Plane:
    marrow, muscle, fat, cartilage = c.vary(0.8), c.vary(0.35), c.vary(0.95), 0.12
    signal = _paint(c.filled(0), c.bar(-0.02, -1.2, 0.02, 1.2, c.vary(0.66, 0.06)), fat)
    signal = _paint(signal, c.bar(0.02, -1.2, 0.06, 1.2, c.vary(0.56, 0.06)), muscle + 0.05 * c.texture(6))
    bend = 0.12 * c.level
    bone = marrow + 0.05 * c.texture(3)
    for mask in (
        c.bar(-0.06 + bend, -1.2, -0.04, -0.35, c.vary(0.2, 0.08)),
        c.ellipse(-0.02, -0.26, c.vary(0.36, 0.08), c.vary(0.25, 0.08)),
    ):
        signal = _paint(signal, mask, bone)
    for mask in (
        c.ellipse(0.0, 0.22, c.vary(0.36, 0.08), c.vary(0.15, 0.08)),
        c.bar(0.0, 0.28, 0.02 - bend, 1.2, c.vary(0.18, 0.08)),
    ):
        signal = _paint(signal, mask, bone)
    signal = _paint(signal, c.bar(-0.32, 0.01, 0.32, 0.03, 0.025), cartilage)
    signal = _paint(signal, c.ellipse(-0.46, -0.22, 0.09, c.vary(0.17), -0.1), bone)
    signal = _paint(signal, c.bar(-0.46, -0.05, -0.3, 0.36, 0.025), 0.08)
    signal = _paint(signal, c.bar(0.1, -0.1, -0.08, 0.16, 0.03), 0.1)
    return _magnitude(signal, c)


def _mr_spine(c: _Canvas) -> Plane:
    t2 = c.body.random() < 0.5
    signal = np.clip(0.75 - 0.55 * np.abs(c.x - 0.25), 0.1, 1) * (0.6 + 0.12 * c.texture(8))
    signal = _paint(signal, c.bar(0.62, -1.2, 0.6, 1.2, 0.22), 0.95)
    bow, phase = c.vary(0.1, 0.5), c.body.uniform(-0.6, 0.6)

    def line(y: float) -> float:
        return bow * float(np.sin(np.pi * (y + phase)))

    pitch = c.vary(0.26, 0.1)
    for y in np.arange(-1.2, 1.25, 0.1):
        signal = _paint(signal, c.bar(line(y) + 0.2, y, line(y + 0.1) + 0.2, y + 0.1, 0.075), 0.9 if t2 else 0.14)
        signal = _paint(signal, c.bar(line(y) + 0.2, y, line(y + 0.1) + 0.2, y + 0.1, 0.035), 0.45)
    for y in np.arange(-1.2, 1.3, pitch) + 0.1 * c.level:
        x = line(y)
        block = _step(0.17 - np.abs(c.x - x), 0.02) * _step(pitch * 0.36 - np.abs(c.y - y), 0.02)
        signal = _paint(signal, block, 0.55 + 0.05 * c.texture(3))
        disc = c.ellipse(x, y + pitch / 2, 0.16, pitch * 0.12, soft=0.02)
        signal = _paint(signal, disc, 0.8 if t2 and c.body.random() < 0.7 else 0.22)
        signal = _paint(signal, c.bar(x + 0.33, y, x + 0.5, y + 0.08, 0.045), 0.5)
    return _magnitude(signal, c)


def _us_liver(c: _Canvas) -> Plane:
    echo = _vessels(0.42 + 0.05 * c.texture(14), c, 6)
    # The right kidney often lies in view below the liver, which keeps this class from being too easy.
    if c.body.random() < 0.5:
        echo = _kidney(echo, c, c.body.uniform(-0.3, 0.3), 0.42, c.vary(0.62))
    arc = np.abs(np.hypot(c.x + 0.1, c.y - 0.1 - 0.1 * c.level) - c.vary(0.78, 0.04))
    echo = _paint(echo, _step(0.035 - arc, 0.02) * (c.y > 0.15), c.vary(0.9))
    return _speckle(echo * (1 - 0.35 * np.clip((c.y + 1) / 2, 0, 1)), c)


def _us_kidney(c: _Canvas) -> Plane:
    echo = 0.4 + 0.1 * c.texture(9)
    if c.body.random() < 0.5:
        echo = _vessels(echo, c, 4)
    echo = _kidney(echo, c, c.body.uniform(-0.15, 0.15), c.vary(0.05, 0.8), c.vary(1.0))
    return _speckle(echo, c)


def _vessels(echo: Plane, c: _Canvas, number: int) -> Plane:
    """Dark vessels with bright walls, each patient's in other places."""
    for _ in range(number):
        x, y = c.body.uniform(-0.6, 0.6), c.body.uniform(-0.4, 0.4)
        turn, length = c.body.uniform(0, np.pi), c.vary(0.22, 0.5)
        dx, dy = length * np.cos(turn), length * np.sin(turn)
        echo = _paint(echo, c.bar(x - dx, y - dy, x + dx, y + dy, 0.05), 0.72)
        echo = _paint(echo, c.bar(x - dx, y - dy, x + dx, y + dy, 0.032), 0.04)
    return echo


def _kidney(echo: Plane, c: _Canvas, x: float, y: float, size: float) -> Plane:
    """A bright capsule, a dark cortex with darker pyramids, a bright sinus, and in some patients a cyst."""
    turn = float(c.body.normal(0.2, 0.25)) + 0.15 * c.level
    rx, ry = c.vary(0.54, 0.1) * size, c.vary(0.27, 0.12) * size
    echo = _paint(echo, c.ellipse(x, y, rx + 0.04, ry + 0.04, turn), 0.75)
    echo = _paint(echo, c.ellipse(x, y, rx, ry, turn), 0.24 + 0.03 * c.texture(4))
    echo = _paint(echo, c.ellipse(x, y, rx * 0.62, ry * 0.45, turn, soft=0.08), 0.85 + 0.15 * c.texture(4))
    for along in (-0.6, -0.2, 0.25, 0.65):
        for side in (-1, 1):
            px = along * rx * np.cos(turn) - side * ry * 0.68 * np.sin(turn)
            py = along * rx * np.sin(turn) + side * ry * 0.68 * np.cos(turn)
            echo = _paint(echo, c.ellipse(x + px, y + py, 0.06 * size, 0.05 * size), 0.1)
    if c.body.random() < 0.3:
        echo = _paint(echo, c.ellipse(x + c.body.uniform(-0.2, 0.2), y, 0.09, 0.08), 0.02)
    return echo


def _dx_chest(c: _Canvas) -> Plane:
    # Attenuation along the beam, summed as in a projection; bone and water add up.
    thick = 1.2 * c.ellipse(0, 0.1, c.vary(0.92, 0.04), c.vary(1.15, 0.04), soft=0.2)
    for side in (-1, 1):
        lung = c.ellipse(
            side * c.vary(0.42, 0.05), -0.08 + 0.04 * c.level, c.vary(0.3), c.vary(0.6), side * 0.1, soft=0.1
        )
        thick = thick - 0.72 * lung * (1 + 0.1 * c.texture(2.5))
        thick = thick + 0.35 * c.bar(side * 0.1, -0.62, side * 0.8, -0.8, 0.045, soft=0.04)
        thick = thick + 0.5 * c.ellipse(side * 0.45, c.vary(0.72, 0.06), 0.4, 0.22, soft=0.12)
        for rib in np.linspace(-0.6, 0.45, 8):
            bow = rib + 0.28 * (np.abs(c.x) - 0.2) ** 2 * 2
            inside = _step(0.72 - np.abs(c.x - side * 0.4), 0.05) * (c.x * side > 0.12)
            thick = thick + 0.16 * _step(0.03 - np.abs(c.y - bow), 0.025) * inside
    thick = thick + 0.55 * c.ellipse(0.14, 0.22, c.vary(0.28, 0.15), c.vary(0.3, 0.15), 0.4, soft=0.08)
    return thick + 0.5 * c.bar(0, -1.2, 0, 1.2, 0.1, soft=0.06) + c.noise(0.015)


def _dx_hand(c: _Canvas) -> Plane:
    soft, bone = c.filled(0), c.filled(0)
    spread = c.vary(0.9, 0.2)
    soft = np.maximum(soft, c.ellipse(0, 0.3, c.vary(0.4, 0.08), 0.4, soft=0.06))
    soft = np.maximum(soft, c.bar(0, 0.5, 0, 1.3, 0.26, soft=0.06))
    for finger, reach in enumerate((0.55, 0.92, 1.0, 0.94, 0.78)):
        turn = (finger - 2) * 0.2 * spread + 0.05 * c.level
        x, y = (finger - 2) * 0.13, 0.42
        if finger == 0:
            turn, x, y = -0.85 * spread, -0.3, 0.45
        joints = np.cumsum([0.0, 0.42, 0.27, 0.17, 0.12]) * c.vary(reach, 0.04) * 1.12
        tips = [(x + r * np.sin(turn), y - r * np.cos(turn)) for r in joints]
        soft = np.maximum(soft, c.bar(*tips[0], *tips[-1], 0.085, soft=0.05))
        for (x0, y0), (x1, y1) in pairwise(tips):
            gap = 0.1
            ends = (x0 + gap * (x1 - x0), y0 + gap * (y1 - y0), x1 - gap * (x1 - x0), y1 - gap * (y1 - y0))
            bone = np.maximum(bone, c.bar(*ends, c.vary(0.037, 0.15)) - 0.45 * c.bar(*ends, 0.014))
    for _ in range(8):
        bone = np.maximum(bone, c.ellipse(c.body.uniform(-0.18, 0.18), c.body.uniform(0.46, 0.68), 0.07, 0.06))
    for side in (-1, 1):
        bone = np.maximum(bone, c.bar(side * 0.11, 0.8, side * 0.13, 1.3, 0.075))
    return 0.45 * soft + 0.75 * bone * (1 + 0.08 * c.texture(2)) + c.noise(0.012)


CLASSES: tuple[_Class, ...] = (
    _Class("CT", "CHEST", ("THORAX", "TH CT CHEST WO C"), "AXIAL CHEST", (320, 320), _ct_chest),
    _Class("CT", "ABDOMEN", ("ABD", "ABDOMINAL"), "AXIAL ABDOMEN", (320, 320), _ct_abdomen),
    _Class("CT", "HEAD", ("KOPF", "CRANIAL"), "AXIAL HEAD", (288, 288), _ct_head),
    _Class("MR", "BRAIN", ("CEREBRAL", "BRAIN W WO"), "AXIAL BRAIN", (256, 256), _mr_brain),
    _Class("MR", "KNEE", ("KNEE RT", "KNEES"), "SAGITTAL KNEE", (256, 256), _mr_knee),
    _Class("MR", "SPINE", ("SPINAL", "WHOLE SPINE"), "SAGITTAL SPINE", (320, 224), _mr_spine),
    _Class("US", "LIVER", ("LIVER PLAIN", "LIVER STUDY"), "LIVER B-MODE", (300, 400), _us_liver),
    _Class("US", "KIDNEY", ("LT KIDNEY", "KIDNEY RIGHT"), "KIDNEY B-MODE", (300, 400), _us_kidney),
    _Class("DX", "CHEST", ("THORAX", "CXR"), "CHEST PA", (420, 360), _dx_chest),
    _Class("DX", "HAND", ("HANDS", "LT HAND"), "HAND PA", (420, 320), _dx_hand),
)


def _spine(hu: Plane, c: _Canvas, y: float) -> Plane:
    hu = _paint(hu, c.ellipse(0, y, 0.13, 0.1), c.vary(420, 0.3))
    hu = _paint(hu, c.ellipse(0, y + 0.1, 0.045, 0.04), 25)
    return _paint(hu, c.bar(0, y + 0.14, 0, y + 0.2, 0.03), 500)


def _table(c: _Canvas) -> Plane:
    return _step(0.02 - np.abs(c.y - 0.8 - 0.1 * c.x**2), 0.01)


def _magnitude(signal: Plane, c: _Canvas) -> Plane:
    """MR magnitude in 0…1: coil shading over the field, and Rician noise, which is never negative."""
    px, py = c.body.uniform(-0.6, 0.6, 2)
    shaded = signal * (0.75 + 0.4 * np.exp(-((c.x - px) ** 2 + (c.y - py) ** 2)))
    strength = c.vary(0.03, 0.4)
    return np.hypot(shaded + c.noise(strength), c.noise(strength)) / 1.3


def _speckle(echo: Plane, c: _Canvas) -> Plane:
    """Ultrasound in 0…1: log-compressed speckle inside a curved sector, black outside."""
    grain = np.hypot(c.texture(1.1, of_body=False), c.texture(1.1, of_body=False)) / 1.25
    shown = np.log1p(20 * np.clip(echo, 0, None) * grain) / np.log1p(20 * 1.6)
    rows, columns = c.shape
    y, x = _grid(c.shape)
    radius, angle = np.hypot(x * columns / rows, y + 1.5), np.arctan2(x * columns / rows, y + 1.5)
    sector = (radius > 0.6) & (radius < 2.45) & (np.abs(angle) < 0.62)
    return np.where(sector, np.clip(shown, 0, 1), 0.0)


def _grid(shape: tuple[int, int]) -> tuple[Plane, Plane]:
    """y and x in -1…1 as arrays that broadcast to `shape`."""
    y, x = (np.linspace(-1.0, 1.0, side, dtype=np.float32) for side in shape)
    return y[:, None], x[None, :]


def _step(signed_distance: Plane, soft: float) -> Plane:
    """0 far below zero, 1 far above; a clipped smoothstep, so that both ends are exact."""
    t = np.clip(signed_distance / soft + 0.5, 0, 1)
    smooth: Plane = t * t * (3 - 2 * t)
    return smooth


def _paint(under: Plane, mask: Plane, value: Plane | float) -> Plane:
    painted: Plane = under * (1 - mask) + value * mask
    return painted


def _smooth_noise(shape: tuple[int, int], grain: float, rng: np.random.Generator) -> Plane:
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :])
    spectrum = np.fft.rfft2(rng.standard_normal(shape, dtype=np.float32)) * np.exp(
        -2 * (np.pi * grain * frequency) ** 2
    )
    field: Plane = np.fft.irfft2(spectrum, s=shape).astype(np.float32)
    field -= field.mean()
    field /= field.std()
    return field


# --- phantoms as DICOM ---


def _write_phantoms(folder: Path, images_per_class: int, seed: int) -> Iterator[Path]:
    for position, kind in enumerate(CLASSES):
        patients = max(4, images_per_class // 3)
        for number in range(patients):
            subject = _Subject(kind, number, seed)
            # Every patient with its own scanner, and so with its own syntax and pixel format.
            scanner = position + number
            images = range(number, images_per_class, patients)
            for place, image in enumerate(images):
                series = 1 + (place * 2) // max(len(images), 2)
                level = -0.8 + 1.6 * (place + 0.5) / len(images)
                dataset, syntax = _phantom(subject, series, place, level, image, scanner)
                # Archives name their objects as they like; every third scanner leaves the suffix out.
                name = f"IM{place + 1:04d}" + ("" if scanner % 3 == 2 else ".dcm")
                path = folder / "phantoms" / subject.patient_id / f"SE{series:02d}" / name
                _write(path, _as_bytes(dataset, syntax))
                yield path


def _phantom(
    subject: _Subject, series: int, place: int, level: float, image: int, scanner: int
) -> tuple[Dataset, uid.UID]:
    kind = subject.kind
    canvas = _Canvas(kind.shape, subject, level, image)
    ds = _patient_tags(subject, series, place, scanner)
    ds.SOPInstanceUID = _uid(subject.seed, subject.patient_id, series, place)
    spelling = _spelling(subject, series)
    if spelling is not None:
        ds.BodyPartExamined = spelling
    plane = kind.draw(canvas)
    syntaxes: tuple[uid.UID, ...]
    if kind.modality == "CT":
        _ct_pixels(ds, plane, scanner)
        syntaxes = (*_NATIVE, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.JPEGLosslessSV1, uid.RLELossless)
    elif kind.modality == "MR":
        _mr_pixels(ds, plane, scanner)
        syntaxes = (*_NATIVE, uid.JPEGLosslessSV1, uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless)
    elif kind.modality == "US":
        _us_pixels(ds, plane, scanner)
        syntaxes = (uid.JPEGBaseline8Bit, uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless)
    else:
        _dx_pixels(ds, plane, subject, scanner)
        syntaxes = (*_NATIVE, uid.JPEG2000Lossless, uid.JPEGLosslessSV1, uid.RLELossless)
    return ds, syntaxes[scanner % len(syntaxes)]


_NATIVE = (
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)


def _spelling(subject: _Subject, series: int) -> str | None:
    """BodyPartExamined as archives have it: mostly plain, some in other words, some missing (of MR the most)."""
    turn = subject.number % 8
    if turn == 6 or (turn == 4 and subject.kind.modality == "MR" and series == 2):
        return None
    if turn in (2, 5):
        return subject.kind.spellings[(turn == 5) % len(subject.kind.spellings)]
    return subject.kind.body_part


def _patient_tags(subject: _Subject, series: int, place: int, scanner: int) -> Dataset:
    """The patient, study and series modules (PS3.3 C.7.1 to C.7.3) and what says that nobody was imaged."""
    kind, rng = subject.kind, subject.rng("tags")
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName = f"SYNTHETIC^{kind.body_part}^{subject.number:03d}"
    ds.PatientID = subject.patient_id
    ds.PatientSex = ("F", "M", "F", "M", "O")[int(rng.integers(0, 5))]
    ds.PatientBirthDate = ""
    ds.PatientAge = _age(subject.number, rng)
    year = int(rng.integers(2012, 2025))
    ds.StudyDate = f"{year}{int(rng.integers(1, 13)):02d}{int(rng.integers(1, 28)):02d}"
    ds.StudyTime = ""
    ds.AccessionNumber = ""
    ds.ReferringPhysicianName = ""
    ds.StudyID = "1"
    ds.StudyInstanceUID = _uid(subject.seed, subject.patient_id)
    ds.StudyDescription = "SYNTHETIC PHANTOM"
    ds.SeriesInstanceUID = _uid(subject.seed, subject.patient_id, series)
    ds.FrameOfReferenceUID = _uid(subject.seed, subject.patient_id, "frame of reference")
    ds.SeriesNumber = str(series)
    ds.SeriesDescription = f"SYNTHETIC {kind.description}"
    ds.InstanceNumber = str(place + 1)
    ds.Modality = kind.modality
    ds.Manufacturer = _MANUFACTURER
    ds.ManufacturerModelName = f"drawing {scanner % 8}"
    ds.ImageComments = "SYNTHETIC: ellipses and textures drawn by a program; no patient, no scanner"
    ds.BurnedInAnnotation = "NO"
    return ds


def _age(number: int, rng: np.random.Generator) -> str:
    """PatientAge in all four units of AS (PS3.5 6.2): days, weeks, months and years."""
    unit = "DYWYMYYY"[number % 8]
    low, high = {"D": (1, 30), "W": (5, 26), "M": (7, 23), "Y": (2, 90)}[unit]
    return f"{int(rng.integers(low, high)):03d}{unit}"


def _ct_pixels(ds: Dataset, hu: Plane, scanner: int) -> None:
    """CT in Hounsfield units (PS3.3 C.8.2.1): unsigned with an intercept, or signed with padding outside the field."""
    ds.SOPClassUID = uid.CTImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.KVP = "120"
    ds.SliceThickness = ("1.25", "2.5", "5")[scanner % 3]
    ds.PixelSpacing = ["1.25", "1.25"]
    ds.RescaleSlope = "1"
    ds.RescaleType = "HU"
    ds.WindowCenter, ds.WindowWidth = ("-500", "1500") if scanner % 4 == 0 else ("40", "400")
    values = np.clip(np.rint(hu), -1024, 3071)
    if scanner % 2:
        ds.RescaleIntercept = "0"
        rows, columns = values.shape
        y, x = np.ogrid[:rows, :columns]
        outside = np.hypot(y - rows / 2 + 0.5, x - columns / 2 + 0.5) > min(rows, columns) / 2
        # PS3.3 C.7.5.1.1.2: US or SS as the pixels are; the value lies below every real one.
        ds.add_new("PixelPaddingValue", "SS", -2000)
        _gray_pixels(ds, np.where(outside, -2000, values).astype("<i2"), stored=16)
    else:
        ds.RescaleIntercept = "-1024"
        _gray_pixels(ds, (values + 1024).astype("<u2"), stored=12)


def _mr_pixels(ds: Dataset, signal: Plane, scanner: int) -> None:
    """MR in arbitrary units (PS3.3 C.8.3.1): each scanner with its own gain, 12 bits unsigned or 16 signed."""
    ds.SOPClassUID = uid.MRImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    ds.ScanningSequence = "SE"
    ds.SequenceVariant = "NONE"
    ds.ScanOptions = ""
    ds.MRAcquisitionType = "2D"
    ds.EchoTime = "90" if scanner % 2 else "12"
    ds.RepetitionTime = "4000" if scanner % 2 else "500"
    ds.EchoTrainLength = "1"
    ds.SliceThickness = "4"
    ds.PixelSpacing = ["0.9", "0.9"]
    gain = (900, 2600, 4095, 16000)[scanner % 4]
    values = np.clip(np.rint(signal * gain), 0, gain)
    if gain > 4095:
        _gray_pixels(ds, values.astype("<i2"), stored=16)
    else:
        _gray_pixels(ds, values.astype("<u2"), stored=12)


def _us_pixels(ds: Dataset, echo: Plane, scanner: int) -> None:
    """Ultrasound, 8 bits gray or RGB, with its region (PS3.3 C.8.5.5) and the console's gray wedge beside it."""
    ds.SOPClassUID = uid.UltrasoundImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "ABDOMINAL", "0001"]
    rows, columns = echo.shape
    top, left = 24, 40
    screen = np.zeros((rows + top, columns + left))
    screen[top:, left:] = echo
    screen[top + 20 : top + 120, 8:20] = np.linspace(1, 0, 100)[:, None]
    screen[:6, :] = 0.25
    region = Dataset()
    region.RegionSpatialFormat = 1
    region.RegionDataType = 1
    region.RegionFlags = 0
    region.RegionLocationMinX0 = left
    region.RegionLocationMinY0 = top
    region.RegionLocationMaxX1 = left + columns - 1
    region.RegionLocationMaxY1 = top + rows - 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX = region.PhysicalDeltaY = 0.04
    ds.SequenceOfUltrasoundRegions = DicomSequence([region])
    values = np.rint(screen * 255).astype("u1")
    if scanner % 4 == 1:
        ds.SamplesPerPixel = 3
        ds.PhotometricInterpretation = "RGB"
        ds.PlanarConfiguration = 0
        _store(ds, np.repeat(values[:, :, None], 3, axis=2), stored=8)
    else:
        _gray_pixels(ds, values, stored=8)


def _dx_pixels(ds: Dataset, thickness: Plane, subject: _Subject, scanner: int) -> None:
    """Projection radiography for presentation (PS3.3 C.8.11): MONOCHROME1 is film, where much beam is dark."""
    ds.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.PixelIntensityRelationship = "LOG"
    ds.ViewPosition = "PA"
    ds.ImageLaterality = "U" if subject.kind.body_part == "CHEST" else "LR"[subject.number % 2]
    ds.ImagerPixelSpacing = ["0.8", "0.8"]
    ds.RescaleIntercept = "0"
    ds.RescaleSlope = "1"
    ds.RescaleType = "US"
    stored = (12, 14)[scanner % 2]
    top = 2**stored - 1
    values = np.clip(np.rint(thickness / 2.2 * top), 0, top)
    if scanner % 3 == 0:
        ds.PixelIntensityRelationshipSign = -1
        ds.PresentationLUTShape = "IDENTITY"
        _gray_pixels(ds, values.astype("<u2"), stored)
    else:
        ds.PixelIntensityRelationshipSign = 1
        ds.PresentationLUTShape = "INVERSE"
        _gray_pixels(ds, (top - values).astype("<u2"), stored, photometric="MONOCHROME1")


def _gray_pixels(ds: Dataset, values: NDArray[np.generic], stored: int, photometric: str = "MONOCHROME2") -> None:
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = photometric
    _store(ds, values, stored)


def _store(ds: Dataset, values: NDArray[np.generic], stored: int) -> None:
    """The Image Pixel module (PS3.3 C.7.6.3) of little-endian values."""
    ds.Rows, ds.Columns = values.shape[:2]
    ds.BitsAllocated = values.dtype.itemsize * 8
    ds.BitsStored = stored
    ds.HighBit = stored - 1
    ds.PixelRepresentation = int(values.dtype.kind == "i")
    content = values.tobytes()
    ds.add_new("PixelData", "OB" if values.dtype.itemsize == 1 else "OW", content + b"\0" * (len(content) % 2))


def _as_bytes(ds: Dataset, syntax: uid.UID) -> bytes:
    """The whole file (PS3.10 7) of a dataset with native little-endian pixels, in any of our transfer syntaxes."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    if syntax in (uid.JPEGLSLossless, uid.JPEGLosslessSV1):
        _encapsulate(ds, _gdcm_codestream(_as_bytes(ds, uid.ExplicitVRLittleEndian), syntax), syntax)
    elif syntax == uid.JPEGBaseline8Bit:
        _jpeg(ds)
    elif syntax == uid.JPEG2000Lossless:
        ds.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    elif syntax == uid.RLELossless:
        ds.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
    elif syntax == uid.ExplicitVRBigEndian and ds.BitsAllocated == 16:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    ds.file_meta.TransferSyntaxUID = syntax
    stream = io.BytesIO()
    ds.save_as(
        stream,
        enforce_file_format=True,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
    )
    return stream.getvalue()


def _jpeg(ds: Dataset) -> None:
    """Pixels as JPEG baseline, and the tags that say something was lost (PS3.3 C.7.6.1.1.5)."""
    gray = ds.SamplesPerPixel == 1
    shape = (ds.Rows, ds.Columns) if gray else (ds.Rows, ds.Columns, 3)
    native = ds.PixelData[: int(np.prod(shape))]
    stream = io.BytesIO()
    # 4:2:2 is what PS3.5 8.2.1 expects of YBR_FULL_422.
    Image.fromarray(np.frombuffer(native, "u1").reshape(shape)).save(stream, "JPEG", quality=92, subsampling=1)
    if not gray:
        ds.PhotometricInterpretation = "YBR_FULL_422"
    ds.LossyImageCompression = "01"
    ds.LossyImageCompressionRatio = f"{len(native) / len(stream.getvalue()):.1f}"
    ds.LossyImageCompressionMethod = "ISO_10918_1"
    _encapsulate(ds, stream.getvalue(), uid.JPEGBaseline8Bit)


def _encapsulate(ds: Dataset, codestream: bytes, syntax: uid.UID) -> None:
    ds.PixelData = encapsulate([codestream])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax


def _gdcm_codestream(content: bytes, syntax: uid.UID) -> bytes:
    """Pixels of a native file in JPEG-LS or lossless JPEG, for which pydicom has no encoder. GDCM reads files only."""
    # Its import makes all symbols of its codecs global; only who draws an archive should pay for that.
    import gdcm

    wanted = {
        uid.JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
        uid.JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    }[syntax]
    with tempfile.TemporaryDirectory(prefix="cbmir-") as scratch:
        source, target = os.path.join(scratch, "native"), os.path.join(scratch, "encoded")
        Path(source).write_bytes(content)
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(source)
        read = reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(wanted))
        change.SetInput(reader.GetImage())
        changed = read and change.Change()
        writer.SetFileName(target)
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        if not (changed and writer.Write()):
            raise RuntimeError(f"GDCM did not encode a phantom as {syntax.name}")
        encoded = pydicom.dcmread(target)
    return next(pydicom.encaps.generate_frames(encoded.PixelData, number_of_frames=1))


# --- what an archive also holds ---


def _write_companions(folder: Path, seed: int) -> None:
    """A localizer and a dose screen of the first CT patient: pixels, but not content."""
    subject = _Subject(CLASSES[0], 0, seed)
    canvas = _Canvas((256, 256), subject, 0.0, 90)
    localizer = _patient_tags(subject, 8, 0, 0)
    localizer.SOPInstanceUID = _uid(seed, subject.patient_id, "localizer")
    localizer.BodyPartExamined = "CHEST"
    _ct_pixels(localizer, _dx_chest(canvas) * 700 - 400, 0)
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    localizer.SeriesDescription = "SYNTHETIC LOCALIZER"
    _write(folder / "phantoms" / subject.patient_id / "SE08" / "IM0001.dcm", _as_bytes(localizer, _NATIVE[0]))

    screen = _patient_tags(subject, 9, 0, 0)
    screen.SOPInstanceUID = _uid(seed, subject.patient_id, "dose screen")
    screen.SOPClassUID = uid.SecondaryCaptureImageStorage
    screen.ConversionType = "WSD"
    screen.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    screen.SeriesDescription = "SYNTHETIC DOSE REPORT"
    screen.BurnedInAnnotation = "YES"
    bars = np.zeros((200, 320), "u1")
    # Rows of blocks in the place of lines of text: nothing that could be read as somebody's name.
    for line in range(10, 190, 16):
        widths = subject.rng("screen", line).integers(4, 40, 8)
        bars[line : line + 8, 12 : 12 + int(widths.sum())] = 220
        bars[line : line + 8, 12 + np.cumsum(widths)] = 0
    _gray_pixels(screen, bars, stored=8)
    _write(folder / "phantoms" / subject.patient_id / "SE09" / "IM0001.dcm", _as_bytes(screen, _NATIVE[0]))


def _write_troubles(folder: Path, phantoms: Sequence[Path], seed: int) -> None:
    """What every archive has: the same file twice, one UID with two contents, and files that are broken."""
    for number, source in enumerate(phantoms[:: max(1, len(phantoms) // 3)][:3]):
        _write(folder / "duplicates" / f"copy{number}.dcm", source.read_bytes())

    subject = _Subject(CLASSES[1], 0, seed)
    first, syntax = _phantom(subject, 1, 0, -0.5, 900, scanner=1)
    second, _ = _phantom(subject, 1, 0, 0.5, 901, scanner=1)
    for name, ds in (("first", first), ("second", second)):
        ds.SOPInstanceUID = _uid(seed, "conflict")
        _write(folder / "conflicts" / f"{name}.dcm", _as_bytes(ds, syntax))

    broken, whole = folder / "broken", _as_bytes(_phantom(subject, 1, 0, 0.0, 902, scanner=1)[0], _NATIVE[0])
    _write(broken / "truncated.dcm", whole[: len(whole) * 3 // 5])
    _write(broken / "empty.dcm", b"")
    _write(broken / "letter.dcm", b"Dear colleague, please find the images attached.\n")
    _write(broken / "zeros.dcm", b"\0" * 4096)
    liar = _phantom(subject, 1, 0, 0.0, 903, scanner=1)[0]
    liar.SOPInstanceUID = _uid(seed, "lying dimensions")
    liar.Rows = liar.Columns = 60000
    _write(broken / "lying_dimensions.dcm", _as_bytes(liar, _NATIVE[0]))
    nameless = _phantom(subject, 1, 0, 0.0, 904, scanner=1)[0]
    content = _as_bytes(nameless, _NATIVE[0])
    # The element itself cannot be left out by a writer that keeps the rules, so its value is made invalid.
    _write(
        broken / "invalid_uid.dcm",
        content.replace(nameless.SOPInstanceUID.encode(), b"x" * len(nameless.SOPInstanceUID)),
    )


def _copy_pydicom_files(folder: Path) -> None:
    """pydicom's own test files, real and broken ones, as far as the installed package carries them."""
    source = Path(pydicom.data.__file__).parent / "test_files"
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            _write(folder / path.relative_to(source), path.read_bytes())


def _readme(images_per_class: int, seed: int) -> str:
    return (
        "SYNTHETIC demo archive of cbmir_spark.\n"
        "phantoms/, duplicates/, conflicts/, broken/: drawn by a program; no patient, no scanner.\n"
        "pydicom/: the test files of the pydicom package, unchanged.\n"
        f"images per class: {images_per_class}\nseed: {seed}\n"
    )


def _archive(folder: Path, created: bool) -> Archive:
    files = sum(path.is_file() for path in folder.rglob("*"))
    phantoms = sum(path.is_file() for path in (folder / "phantoms").rglob("*"))
    return Archive(folder, created, files, phantoms, tuple(kind.label for kind in CLASSES))


# --- pictures ---


@dataclass(frozen=True)
class _Picture:
    source: Path
    file: str
    target: str
    modality: str
    body_part: str
    group: str
    derivation: str


def _read_labels(labels_csv: Path, images: Path) -> list[_Picture]:
    try:
        with labels_csv.open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            missing = [column for column in LABEL_COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{labels_csv} lacks the column {', '.join(missing)}")
            pictures = [_picture(row, images, f"{labels_csv}, line {reader.line_num}") for row in reader]
    except OSError as error:
        raise InputError(f"labels {labels_csv}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"labels {labels_csv}: not UTF-8 text") from None
    twice = [target for target, count in Counter(p.target for p in pictures).items() if count > 1]
    if twice:
        raise InputError(f"{labels_csv} names {twice[0].removesuffix('.dcm')} more than once")
    return pictures


def _picture(row: Mapping[str, str | None], images: Path, place: str) -> _Picture:
    value = {column: (row[column] or "").strip() for column in LABEL_COLUMNS}
    file = PurePosixPath(value["file"])
    if not value["file"] or file.is_absolute() or ".." in file.parts:
        raise InputError(f"{place}: file must be a path below the images folder")
    source = images / file
    if not source.is_file():
        raise InputError(f"{place}: there is no picture {source}")
    modality = vocabulary.Vocabulary().modality(value["modality"])
    if modality == vocabulary.UNKNOWN:
        raise InputError(f"{place}: modality {value['modality']!r} is not one that DICOM knows")
    body_part = value["body_part"].upper()
    if not 0 < len(body_part) <= _CS or vocabulary.Vocabulary().body_part(body_part) == vocabulary.UNKNOWN:
        raise InputError(f"{place}: body part {value['body_part']!r} is not in the vocabulary")
    if len(value["group"]) > _LO or "\\" in value["group"]:
        raise InputError(f"{place}: group must have at most {_LO} characters and no backslash, as a PatientID")
    origin = (f"{name} {value[name]}" for name in ("dataset", "source_id", "licence") if value[name])
    derivation = f"Secondary capture of a published picture; tags derived from its label; {'; '.join(origin)}; {file}"
    return _Picture(
        source=source,
        file=str(file),
        target=f"{file}.dcm",
        modality=modality,
        body_part=body_part,
        group=value["group"],
        derivation=derivation[:_ST],
    )


def _secondary_capture(picture: _Picture) -> Dataset:
    """The Secondary Capture IOD (PS3.3 A.8.1); type 2 attributes that nobody knows stay empty."""
    content = picture.source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    patient = picture.group or digest[:32]
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = uid.SecondaryCaptureImageStorage
    ds.SOPInstanceUID = _uid("picture", picture.file, digest)
    ds.StudyInstanceUID = _uid("study", patient)
    ds.SeriesInstanceUID = _uid("series", patient, picture.modality, picture.body_part)
    ds.PatientID = patient
    ds.PatientName = ds.PatientSex = ds.PatientBirthDate = ""
    ds.StudyDate = ds.StudyTime = ds.StudyID = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.SeriesNumber = ds.InstanceNumber = ds.PatientOrientation = None
    ds.Modality = picture.modality
    ds.BodyPartExamined = picture.body_part
    ds.ConversionType = "WSD"
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.DerivationDescription = picture.derivation
    ds.BurnedInAnnotation = "NO"
    try:
        with Image.open(io.BytesIO(content)) as image:
            lossy = image.format == "JPEG"
            deep = image.mode.startswith("I;16")
            values = np.asarray(image if deep else image.convert("L"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        raise InputError(f"{picture.source} cannot be read as a picture") from None
    if lossy:
        ds.LossyImageCompression = "01"
        ds.LossyImageCompressionMethod = "ISO_10918_1"
    _gray_pixels(ds, values.astype("<u2" if deep else "u1"), stored=16 if deep else 8)
    return ds


def _write_if_new(path: Path, content: bytes) -> bool:
    try:
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            return False
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
    return True


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _uid(*parts: object) -> str:
    """A UID from a name: a version 5 UUID under 2.25 (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, _name(*parts)).int}"


def _rng(*parts: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(_name(*parts).encode()).digest()[:16], "big"))


def _name(*parts: object) -> str:
    return "cbmir_spark/" + "/".join(str(part) for part in parts)
