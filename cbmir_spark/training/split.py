"""Split patients into train, validation and test."""

import hashlib

import pandas as pd

from cbmir_spark.lake import columns as cols
from cbmir_spark.training.manifest import LABEL, TEST, TRAIN, VALIDATION


def split_patients(images: pd.DataFrame, test_fraction: float, validation_fraction: float, seed: int) -> dict[str, str]:
    """Assign each patient to `train`, `validation` or `test`. Runs on the driver.

    `images` has one row for each patient_id and label. Fractions are of each class's patients, taken in an
    order that only the seed and the ids decide, rarest class first. At least one patient of every class stays in train;
    a class with two patients or more gets one in test, unless that would empty another class's train side; a class with
    three or more gets one in validation too.
    """
    patients: dict[str, set[str]] = {}
    labels: dict[str, set[str]] = {}
    for patient, label in images[[cols.PATIENT_ID, LABEL]].drop_duplicates().itertuples(index=False):
        patients.setdefault(label, set()).add(patient)
        labels.setdefault(patient, set()).add(label)
    side: dict[str, str] = {}
    held_out = dict.fromkeys(patients, 0)

    def may_leave_train(patient: str) -> bool:
        return all(len(patients[label]) - held_out[label] > 1 for label in labels[patient])

    def hold_out(patient: str, where: str) -> None:
        side[patient] = where
        for label in labels[patient]:
            held_out[label] += 1

    def order(patient: str) -> str:
        return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()

    def has(label: str, where: str) -> bool:
        return any(side.get(patient) == where for patient in patients[label])

    def serves(patient: str, where: str) -> int:
        return sum(not has(label, where) for label in labels[patient])

    for label in sorted(patients, key=lambda label: (len(patients[label]), label)):
        members = sorted(patients[label], key=order)
        wanted = {TEST: 0, VALIDATION: 0}
        if test_fraction > 0:
            wanted[TEST] = max(1, round(test_fraction * len(members)))
        if validation_fraction > 0 and len(members) > 2:
            wanted[VALIDATION] = max(1, round(validation_fraction * len(members)))
        for where, count in wanted.items():
            free = [patient for patient in members if patient not in side]
            if not has(label, where):
                # Prefer a patient who also serves other classes without anybody on this side.
                free.sort(key=lambda patient: (-serves(patient, where), order(patient)))
            missing = count - sum(side.get(patient) == where for patient in members)
            for patient in free:
                if missing > 0 and may_leave_train(patient):
                    hold_out(patient, where)
                    missing -= 1
        for patient in members:
            side.setdefault(patient, TRAIN)
    if test_fraction > 0:
        for label in sorted(patients):
            if not has(label, TEST):
                movable = [p for p in sorted(patients[label], key=order) if side[p] == TRAIN and may_leave_train(p)]
                for patient in movable[:1]:
                    hold_out(patient, TEST)
    return side
