"""What each value of the column `reason` in SOURCES means, and what a site can do about it."""

from collections.abc import Mapping

from cbmir_spark.dicom import reasons
from cbmir_spark.dicom.reasons import Explanation
from cbmir_spark.lake import columns as cols

__all__ = ["EXPLANATIONS", "Explanation"]

EXPLANATIONS: Mapping[str, Explanation] = {
    **{reason.value: explanation for reason, explanation in reasons.EXPLANATIONS.items()},
    cols.NOT_A_FILE: Explanation(
        "It cannot be opened: a link that leads nowhere, a pipe, a socket, a device or too long a path.",
        "Nothing, unless a link should lead somewhere or a path is too long: then mount or shorten it.",
    ),
    cols.UNREADABLE: Explanation(
        "Storage refused to hand it out.",
        "Check its permissions and the storage; the next `cbmir ingest` tries it again.",
    ),
    cols.GONE: Explanation(
        "It was deleted after it was listed.",
        "Nothing: the next `cbmir ingest` looks for it again.",
    ),
    cols.REPLACED: Explanation(
        "It changed while it was read.",
        "Nothing: the next `cbmir ingest` reads it again.",
    ),
    cols.ERASED: Explanation(
        "Its image, series, study or patient was erased by `cbmir forget`.",
        "Nothing, or delete it from the archive too.",
    ),
    cols.REREAD: Explanation(
        "It is marked by `cbmir remap` or `cbmir upgrade` to be read again.",
        "Nothing: the next `cbmir ingest` reads it again.",
    ),
}
