"""Choose the partitions that a query searches. Runs on the driver."""

from collections.abc import Iterable

from cbmir_spark.config import RetrievalSettings
from cbmir_spark.dicom.vocabulary_tables import UNKNOWN
from cbmir_spark.index.layout import Place
from cbmir_spark.models import artifact
from cbmir_spark.retrieval.query import Query


def plan(query: Query, options: RetrievalSettings, existing: Iterable[Place]) -> frozenset[Place]:
    """Choose the partitions that a query searches, of those that exist.

    `tags` goes by the query's body part, or by its predicted class where the tags have none; `predicted` by the
    predicted class. A prediction below `min_probability`, or none, widens either to the query's modality, which is
    what `modality` searches. Where not even the modality is known, and under `none`, all partitions are searched. In
    every mode `unknown` decides on the partitions of the UNKNOWN body part: with `include` they are searched too. A
    modality or body part in the query's row of the list overrides all this.
    """
    modality, body_part = searched_terms(query, options)
    found = set()
    for place in existing:
        if modality not in (None, place[0]):
            continue
        if place[1] == UNKNOWN and body_part != UNKNOWN:
            if options.unknown == "include":
                found.add(place)
        elif body_part in (None, place[1]):
            found.add(place)
    return frozenset(found)


def searched_terms(query: Query, options: RetrievalSettings) -> tuple[str | None, str | None]:
    """Return the modality and body part to search; None for any."""
    modality, body_part = _by_prefilter(query, options)
    return query.overrides.modality or modality, query.overrides.body_part or body_part


def _by_prefilter(query: Query, options: RetrievalSettings) -> tuple[str | None, str | None]:
    if options.prefilter == "none":
        return None, None
    sure = query.predicted != UNKNOWN and query.probability >= options.min_probability
    predicted_modality = query.predicted.rpartition("/")[0] if sure else ""
    modality = query.modality if query.modality != UNKNOWN else predicted_modality or None
    if options.prefilter == "modality":
        return modality, None
    if options.prefilter == "tags" and query.body_part != UNKNOWN:
        return modality, query.body_part
    return modality, artifact.body_part_of(query.predicted) if sure else None
