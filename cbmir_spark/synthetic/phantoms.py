"""The phantoms of the demo archive: ten classes of modality and body part, drawn of ellipses, rods and textures.

CT is in Hounsfield units; MR, ultrasound and radiographs are in arbitrary units from 0 to about 1.
"""

from itertools import pairwise

import numpy as np

from cbmir_spark.synthetic.canvas import Canvas, PhantomClass, Plane, grid, paint, step

__all__ = ["CLASSES", "chest_radiograph"]


# --- CT ---


def _ct_chest(c: Canvas) -> Plane:
    body = c.ellipse(0, 0, c.vary(0.86, 0.05), c.vary(0.62, 0.08))
    inner = c.ellipse(0, 0, c.vary(0.78, 0.04), c.vary(0.54, 0.06))
    hu = paint(c.filled(-1000), body, -95 + 12 * c.texture(6))
    hu = paint(hu, inner, 45 + 8 * c.texture(5))
    vessels = np.clip(c.texture(2.2), 1.1, 3) - 1.1
    lung = -860 + 330 * vessels + 25 * c.texture(9)
    height = 1 - 0.25 * c.level
    for side in (-1, 1):
        rx = c.vary(0.29) * (0.9 if side > 0 else 1.0)
        hu = paint(hu, c.ellipse(side * 0.4, 0.02, rx, c.vary(0.42) * height, side * 0.12), lung)
    heart = c.ellipse(0.12, -0.08, c.vary(0.26, 0.2) * (0.85 + 0.3 * c.level), c.vary(0.22, 0.2), 0.5)
    hu = paint(hu, heart, 48 + 90 * (c.body.random() < 0.4) + 6 * c.texture(7))
    hu = paint(hu, c.ellipse(0.08, 0.24, 0.06, 0.06), 60 + 110 * (c.body.random() < 0.4))
    for angle in np.linspace(0, 2 * np.pi, 14, endpoint=False) + 0.22 * c.level:
        rib = c.ellipse(0.79 * np.cos(angle), 0.56 * np.sin(angle), 0.07, 0.03, angle + np.pi / 2)
        hu = paint(hu, rib, 520)
    return paint(_spine(hu, c, 0.42), _table(c), -400) + c.noise(c.vary(22, 0.4))


def _ct_abdomen(c: Canvas) -> Plane:
    body = c.ellipse(0, 0, c.vary(0.84, 0.06), c.vary(0.6, 0.1))
    inner = c.ellipse(0, 0, c.vary(0.72, 0.06), c.vary(0.5, 0.08))
    contrast = 55.0 if c.body.random() < 0.5 else 0.0
    hu = paint(c.filled(-1000), body, -105 + 10 * c.texture(6))
    hu = paint(hu, inner, -40 + 45 * np.clip(c.texture(11), -1, 1.5))
    liver = c.ellipse(-0.36, -0.12, c.vary(0.36), c.vary(0.32) * (1 - 0.3 * c.level), 0.4)
    hu = paint(hu, liver, 58 + contrast + 7 * c.texture(4))
    hu = paint(hu, c.ellipse(0.5, -0.02, c.vary(0.15), c.vary(0.24), -0.3), 52 + contrast)
    hu = paint(hu, c.ellipse(0.18, -0.2, c.vary(0.2), c.vary(0.14)), 20 + 15 * c.texture(5))
    for side in (-1, 1):
        hu = paint(hu, c.ellipse(side * 0.38, 0.22, c.vary(0.13), c.vary(0.17), side * 0.5), 35 + 2.2 * contrast)
        hu = paint(hu, c.ellipse(side * 0.37, 0.22, 0.05, 0.07), -40 + contrast)
    for _ in range(5):
        x, y = c.body.uniform(-0.35, 0.45), c.body.uniform(-0.4, 0.05)
        hu = paint(hu, c.ellipse(x, y + 0.06 * c.level, c.vary(0.06, 0.4), 0.045), -750 + 700 * (c.body.random() < 0.5))
    hu = paint(hu, c.ellipse(0.05, 0.2, 0.06, 0.06), 45 + 2 * contrast)
    return paint(_spine(hu, c, 0.36), _table(c), -400) + c.noise(c.vary(16, 0.4))


def _ct_head(c: Canvas) -> Plane:
    size = 1 - 0.18 * abs(c.level)
    rx, ry = c.vary(0.6, 0.05) * size, c.vary(0.74, 0.05) * size
    hu = paint(c.filled(-1000), c.ellipse(0, 0, rx + 0.07, ry + 0.07), 20)
    hu = paint(hu, c.ellipse(0, 0, rx, ry, soft=0.015), c.vary(1050, 0.15))
    brain = c.ellipse(0, 0, rx - 0.08, ry - 0.08, soft=0.015)
    gyri = np.clip(c.texture(3.2), -1.5, 1.5)
    hu = paint(hu, brain, 34 + 3.5 * gyri)
    rim = brain - c.ellipse(0, 0, rx - 0.16, ry - 0.16)
    hu = paint(hu, np.clip(rim, 0, 1) * step(gyri - 0.8, 0.1), 8)
    wide = c.vary(0.09, 0.5) * (1 - 0.5 * abs(c.level))
    for side in (-1, 1):
        hu = paint(hu, c.ellipse(side * 0.13, -0.12, wide, 0.22, side * 0.35), 6)
        hu = paint(hu, c.ellipse(side * 0.17, 0.18, wide * 0.8, 0.16, -side * 0.5), 6)
    hu = paint(hu, c.bar(0, -ry + 0.1, 0, ry - 0.1, 0.008), 60)
    if c.body.random() < 0.25:
        hu = paint(hu, c.ellipse(c.body.uniform(-0.35, 0.35), c.body.uniform(-0.4, 0.4), 0.1, 0.12), 68)
    return hu + c.noise(c.vary(5, 0.4))


def _spine(hu: Plane, c: Canvas, y: float) -> Plane:
    hu = paint(hu, c.ellipse(0, y, 0.13, 0.1), c.vary(420, 0.3))
    hu = paint(hu, c.ellipse(0, y + 0.1, 0.045, 0.04), 25)
    return paint(hu, c.bar(0, y + 0.14, 0, y + 0.2, 0.03), 500)


def _table(c: Canvas) -> Plane:
    return step(0.02 - np.abs(c.y - 0.8 - 0.1 * c.x**2), 0.01)


# --- MR ---


def _mr_brain(c: Canvas) -> Plane:
    size = 1 - 0.18 * abs(c.level)
    rx, ry = c.vary(0.58, 0.05) * size, c.vary(0.72, 0.05) * size
    t2 = c.body.random() < 0.5
    white, gray, fluid = (0.34, 0.52, 1.0) if t2 else (0.78, 0.56, 0.12)
    signal = paint(c.filled(0), c.ellipse(0, 0, rx + 0.12, ry + 0.12), 0.85 if not t2 else 0.6)
    signal = paint(signal, c.ellipse(0, 0, rx + 0.05, ry + 0.05), 0.06)
    signal = paint(signal, c.ellipse(0, 0, rx, ry), fluid)
    fold = 0.05 * np.clip(c.texture(4.5), -1.6, 1.6)
    radius = np.hypot(c.x / rx, c.y / ry)
    signal = paint(signal, step(0.95 + fold - radius, 0.03), gray)
    signal = paint(signal, step(0.82 + 1.9 * fold - radius, 0.03), white)
    wide = c.vary(0.08, 0.4)
    for side in (-1, 1):
        signal = paint(signal, c.ellipse(side * 0.12, -0.1, wide, 0.22, side * 0.35), fluid)
        signal = paint(signal, c.ellipse(side * 0.2, 0.08, 0.09, 0.13, side * 0.2), gray)
    signal = paint(signal, c.bar(0, -ry * 0.95, 0, ry * 0.95, 0.012), fluid)
    return _magnitude(signal, c)


def _mr_knee(c: Canvas) -> Plane:
    marrow, muscle, fat, cartilage = c.vary(0.8), c.vary(0.35), c.vary(0.95), 0.12
    signal = paint(c.filled(0), c.bar(-0.02, -1.2, 0.02, 1.2, c.vary(0.66, 0.06)), fat)
    signal = paint(signal, c.bar(0.02, -1.2, 0.06, 1.2, c.vary(0.56, 0.06)), muscle + 0.05 * c.texture(6))
    bend = 0.12 * c.level
    bone = marrow + 0.05 * c.texture(3)
    for mask in (
        c.bar(-0.06 + bend, -1.2, -0.04, -0.35, c.vary(0.2, 0.08)),
        c.ellipse(-0.02, -0.26, c.vary(0.36, 0.08), c.vary(0.25, 0.08)),
    ):
        signal = paint(signal, mask, bone)
    for mask in (
        c.ellipse(0.0, 0.22, c.vary(0.36, 0.08), c.vary(0.15, 0.08)),
        c.bar(0.0, 0.28, 0.02 - bend, 1.2, c.vary(0.18, 0.08)),
    ):
        signal = paint(signal, mask, bone)
    signal = paint(signal, c.bar(-0.32, 0.01, 0.32, 0.03, 0.025), cartilage)
    signal = paint(signal, c.ellipse(-0.46, -0.22, 0.09, c.vary(0.17), -0.1), bone)
    signal = paint(signal, c.bar(-0.46, -0.05, -0.3, 0.36, 0.025), 0.08)
    signal = paint(signal, c.bar(0.1, -0.1, -0.08, 0.16, 0.03), 0.1)
    return _magnitude(signal, c)


def _mr_spine(c: Canvas) -> Plane:
    t2 = c.body.random() < 0.5
    signal = np.clip(0.75 - 0.55 * np.abs(c.x - 0.25), 0.1, 1) * (0.6 + 0.12 * c.texture(8))
    signal = paint(signal, c.bar(0.62, -1.2, 0.6, 1.2, 0.22), 0.95)
    bow, phase = c.vary(0.1, 0.5), c.body.uniform(-0.6, 0.6)

    def line(y: float) -> float:
        return bow * float(np.sin(np.pi * (y + phase)))

    pitch = c.vary(0.26, 0.1)
    for y in np.arange(-1.2, 1.25, 0.1):
        signal = paint(signal, c.bar(line(y) + 0.2, y, line(y + 0.1) + 0.2, y + 0.1, 0.075), 0.9 if t2 else 0.14)
        signal = paint(signal, c.bar(line(y) + 0.2, y, line(y + 0.1) + 0.2, y + 0.1, 0.035), 0.45)
    for y in np.arange(-1.2, 1.3, pitch) + 0.1 * c.level:
        x = line(y)
        block = step(0.17 - np.abs(c.x - x), 0.02) * step(pitch * 0.36 - np.abs(c.y - y), 0.02)
        signal = paint(signal, block, 0.55 + 0.05 * c.texture(3))
        disc = c.ellipse(x, y + pitch / 2, 0.16, pitch * 0.12, soft=0.02)
        signal = paint(signal, disc, 0.8 if t2 and c.body.random() < 0.7 else 0.22)
        signal = paint(signal, c.bar(x + 0.33, y, x + 0.5, y + 0.08, 0.045), 0.5)
    return _magnitude(signal, c)


def _magnitude(signal: Plane, c: Canvas) -> Plane:
    """Turn signal into MR magnitude from 0 to about 1: coil shading over the field, and Rician noise."""
    px, py = c.body.uniform(-0.6, 0.6, 2)
    shaded = signal * (0.75 + 0.4 * np.exp(-((c.x - px) ** 2 + (c.y - py) ** 2)))
    strength = c.vary(0.03, 0.4)
    magnitude: Plane = np.hypot(shaded + c.noise(strength), c.noise(strength)) / 1.3
    return magnitude


# --- ultrasound ---


def _us_liver(c: Canvas) -> Plane:
    echo = _vessels(0.42 + 0.05 * c.texture(14), c, 6)
    # The right kidney often lies in view below the liver; without it this class would be too easy.
    if c.body.random() < 0.5:
        echo = _kidney(echo, c, c.body.uniform(-0.3, 0.3), 0.42, c.vary(0.62))
    arc = np.abs(np.hypot(c.x + 0.1, c.y - 0.1 - 0.1 * c.level) - c.vary(0.78, 0.04))
    echo = paint(echo, step(0.035 - arc, 0.02) * (c.y > 0.15), c.vary(0.9))
    return _speckle(echo * (1 - 0.35 * np.clip((c.y + 1) / 2, 0, 1)), c)


def _us_kidney(c: Canvas) -> Plane:
    echo = 0.4 + 0.1 * c.texture(9)
    if c.body.random() < 0.5:
        echo = _vessels(echo, c, 4)
    echo = _kidney(echo, c, c.body.uniform(-0.15, 0.15), c.vary(0.05, 0.8), c.vary(1.0))
    return _speckle(echo, c)


def _vessels(echo: Plane, c: Canvas, number: int) -> Plane:
    """Draw dark vessels with bright walls, in other places for each patient."""
    for _ in range(number):
        x, y = c.body.uniform(-0.6, 0.6), c.body.uniform(-0.4, 0.4)
        turn, length = c.body.uniform(0, np.pi), c.vary(0.22, 0.5)
        dx, dy = length * np.cos(turn), length * np.sin(turn)
        echo = paint(echo, c.bar(x - dx, y - dy, x + dx, y + dy, 0.05), 0.72)
        echo = paint(echo, c.bar(x - dx, y - dy, x + dx, y + dy, 0.032), 0.04)
    return echo


def _kidney(echo: Plane, c: Canvas, x: float, y: float, size: float) -> Plane:
    """Draw a bright capsule, a dark cortex with darker pyramids, a bright sinus, and in some patients a cyst."""
    turn = float(c.body.normal(0.2, 0.25)) + 0.15 * c.level
    rx, ry = c.vary(0.54, 0.1) * size, c.vary(0.27, 0.12) * size
    echo = paint(echo, c.ellipse(x, y, rx + 0.04, ry + 0.04, turn), 0.75)
    echo = paint(echo, c.ellipse(x, y, rx, ry, turn), 0.24 + 0.03 * c.texture(4))
    echo = paint(echo, c.ellipse(x, y, rx * 0.62, ry * 0.45, turn, soft=0.08), 0.85 + 0.15 * c.texture(4))
    for along in (-0.6, -0.2, 0.25, 0.65):
        for side in (-1, 1):
            px = along * rx * np.cos(turn) - side * ry * 0.68 * np.sin(turn)
            py = along * rx * np.sin(turn) + side * ry * 0.68 * np.cos(turn)
            echo = paint(echo, c.ellipse(x + px, y + py, 0.06 * size, 0.05 * size), 0.1)
    if c.body.random() < 0.3:
        echo = paint(echo, c.ellipse(x + c.body.uniform(-0.2, 0.2), y, 0.09, 0.08), 0.02)
    return echo


def _speckle(echo: Plane, c: Canvas) -> Plane:
    """Turn echo into ultrasound from 0 to 1: log-compressed speckle in a curved sector, black outside."""
    grain = np.hypot(c.texture(1.1, of_body=False), c.texture(1.1, of_body=False)) / 1.25
    shown = np.log1p(20 * np.clip(echo, 0, None) * grain) / np.log1p(20 * 1.6)
    rows, columns = c.shape
    y, x = grid(c.shape)
    radius, angle = np.hypot(x * columns / rows, y + 1.5), np.arctan2(x * columns / rows, y + 1.5)
    sector = (radius > 0.6) & (radius < 2.45) & (np.abs(angle) < 0.62)
    return np.where(sector, np.clip(shown, 0, 1), 0.0)


# --- radiographs ---


def chest_radiograph(c: Canvas) -> Plane:
    # Attenuation along the beam: bone and water add up, as in a projection.
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
            inside = step(0.72 - np.abs(c.x - side * 0.4), 0.05) * (c.x * side > 0.12)
            thick = thick + 0.16 * step(0.03 - np.abs(c.y - bow), 0.025) * inside
    thick = thick + 0.55 * c.ellipse(0.14, 0.22, c.vary(0.28, 0.15), c.vary(0.3, 0.15), 0.4, soft=0.08)
    return thick + 0.5 * c.bar(0, -1.2, 0, 1.2, 0.1, soft=0.06) + c.noise(0.015)


def _dx_hand(c: Canvas) -> Plane:
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


CLASSES: tuple[PhantomClass, ...] = (
    PhantomClass("CT", "CHEST", ("THORAX", "TH CT CHEST WO C"), "AXIAL CHEST", (320, 320), _ct_chest),
    PhantomClass("CT", "ABDOMEN", ("ABD", "ABDOMINAL"), "AXIAL ABDOMEN", (320, 320), _ct_abdomen),
    PhantomClass("CT", "HEAD", ("KOPF", "CRANIAL"), "AXIAL HEAD", (288, 288), _ct_head),
    PhantomClass("MR", "BRAIN", ("CEREBRAL", "BRAIN W WO"), "AXIAL BRAIN", (256, 256), _mr_brain),
    PhantomClass("MR", "KNEE", ("KNEE RT", "KNEES"), "SAGITTAL KNEE", (256, 256), _mr_knee),
    PhantomClass("MR", "SPINE", ("SPINAL", "WHOLE SPINE"), "SAGITTAL SPINE", (320, 224), _mr_spine),
    PhantomClass("US", "LIVER", ("LIVER PLAIN", "LIVER STUDY"), "LIVER B-MODE", (300, 400), _us_liver),
    PhantomClass("US", "KIDNEY", ("LT KIDNEY", "KIDNEY RIGHT"), "KIDNEY B-MODE", (300, 400), _us_kidney),
    PhantomClass("DX", "CHEST", ("THORAX", "CXR"), "CHEST PA", (420, 360), chest_radiograph),
    PhantomClass("DX", "HAND", ("HANDS", "LT HAND"), "HAND PA", (420, 320), _dx_hand),
)
