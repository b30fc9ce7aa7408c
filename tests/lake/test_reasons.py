"""Every reason that the code can give has its explanation."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cbmir_spark
from cbmir_spark.dicom.reasons import Reason
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake.reasons import EXPLANATIONS
from tests.support.sources import modules

ROOT = Path(cbmir_spark.__file__).parent
NAMES = {f"Reason.{reason.name}" for reason in Reason} | {
    f"cols.{name}" for name, value in vars(cols).items() if name != "REASONS" and value in cols.REASONS
}
# Where a reason is given: the position of the argument, counted from 0, which may be called `reason`.
GIVEN = {"NotAnImage": 0, "Rejected": 0, "_Lost": 0, "Fetched": 4, "ParsedObject": 1, "_unread": 2}


def given(source: str) -> Iterator[str]:
    """The expressions that a module gives as reasons; passing one on is none."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in GIVEN:
            continue
        found = [each.value for each in node.keywords if each.arg == "reason"] or node.args[GIVEN[node.func.id] :][:1]
        for value in found:
            text = ast.unparse(value).removesuffix(".value")
            if isinstance(value, ast.Constant) or text.startswith(("Reason.", "cols.")):
                yield text


def test_every_reason_is_explained() -> None:
    assert set(EXPLANATIONS) == {*Reason, *cols.REASONS}
    assert len(EXPLANATIONS) == len(Reason) + len(cols.REASONS)


@pytest.mark.parametrize("reason", EXPLANATIONS)
def test_an_explanation_is_two_short_sentences(reason: str) -> None:
    """They are cells of a table in Markdown too."""
    explanation = EXPLANATIONS[reason]
    for text in (explanation.meaning, explanation.action):
        assert text[0].isupper() and text.endswith(".") and len(text) < 100
        assert "|" not in text and "\n" not in text


def test_reasons_are_given_by_their_names() -> None:
    found = {name: set(given(path.read_text(encoding="utf-8"))) for name, path in modules(ROOT).items()}
    everywhere = set().union(*found.values())
    assert everywhere - {"None"} <= NAMES
    # REREAD is written into a table, and INTERNAL sent by a process.
    assert {f"cols.{name}" for name in ("NOT_A_FILE", "UNREADABLE", "GONE", "REPLACED", "ERASED")} <= everywhere
    assert {f"Reason.{reason.name}" for reason in Reason if reason is not Reason.INTERNAL} <= everywhere


def test_a_reason_without_a_name_is_found() -> None:
    assert set(given("Rejected('ODD')\nFetched(outcome='rejected', reason='STRANGE')\nRejected(lost.reason)")) == {
        "'ODD'",
        "'STRANGE'",
    }
