"""Standardized uptake values of PET by body weight (PS3.3 section C.8.9)."""

import math
from datetime import datetime, timedelta
from typing import Any

from pydicom.dataset import Dataset

from cbmir_spark.dicom.elements import items, number, value


def suv_factor(ds: Dataset) -> float | None:
    """Compute the factor from a PET image's output units to SUV by body weight (g/ml); None where it is unknown.

    Follows the vendor-neutral computation of the Quantitative Imaging Biomarkers Alliance: BQML with decay correction
    to the start of the scan or to the injection, GML as it is, Philips' CNTS by its private scale factor.
    """
    units = str(value(ds, "Units") or "").strip().upper()
    if units == "GML":
        return 1.0 if str(value(ds, "SUVType") or "BW").strip().upper() == "BW" else None
    if units == "CNTS":
        factor = ds.get((0x7053, 0x1000))
        try:
            scale = float(factor.value) if factor is not None else 0.0
        except (TypeError, ValueError):
            return None
        return scale if scale > 0 and math.isfinite(scale) else None
    drug = next(iter(items(ds, "RadiopharmaceuticalInformationSequence")), None)
    weight = number(ds, "PatientWeight")
    if units != "BQML" or drug is None or not weight or weight <= 0:
        return None
    corrected = {str(x).strip().upper() for x in value(ds, "CorrectedImage") or ()}
    dose, half_life = number(drug, "RadionuclideTotalDose"), number(drug, "RadionuclideHalfLife")
    if not {"ATTN", "DECY"} <= corrected or not dose or dose <= 0 or not half_life or half_life <= 0:
        return None
    decay_correction = str(value(ds, "DecayCorrection") or "").strip().upper()
    if decay_correction == "ADMIN":
        return weight * 1000.0 / dose
    elapsed = _seconds_since_injection(ds, drug) if decay_correction == "START" else None
    if elapsed is None or not 0 <= elapsed < 20 * half_life:
        return None
    return float(weight * 1000.0 / (dose * 2.0 ** (-elapsed / half_life)))


def _seconds_since_injection(ds: Dataset, drug: Dataset) -> float | None:
    scan = _moment(value(ds, "SeriesDate"), value(ds, "SeriesTime"))
    acquired = _moment(value(ds, "AcquisitionDate"), value(ds, "AcquisitionTime"))
    if scan is None or (acquired is not None and scan > acquired):
        # A derived series carries the time of its creation, later than its frames: the start of the scan is unknown.
        return None
    full = str(value(drug, "RadiopharmaceuticalStartDateTime") or "")
    injected = _moment(full[:8], full[8:]) if len(full) >= 14 else None
    if injected is None:
        injected = _moment(value(ds, "SeriesDate"), value(drug, "RadiopharmaceuticalStartTime"))
        if injected is not None and injected > scan:
            injected -= timedelta(days=1)
    return None if injected is None else (scan - injected).total_seconds()


def _moment(date: Any, time: Any) -> datetime | None:
    digits = str(time or "").split("+")[0].split("-")[0].split(".")[0].strip()
    try:
        return datetime.strptime(f"{str(date or '').strip()} {digits[:6]:0<6}", "%Y%m%d %H%M%S") if digits else None
    except ValueError:
        return None
