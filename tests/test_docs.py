"""What is written for those who change the code agrees with the code."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cbmir_spark.lake.reasons import EXPLANATIONS
from tests.conftest import REPO

HOOKS = REPO / ".pre-commit-config.yaml"
PAGES = ("docs/architecture.md", "docs/decisions.md", "CONTRIBUTING.md")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package and its documents, to plant faults in."""
    for name in ("cbmir_spark", "docs"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def draw(repo: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "docs" / "draw_packages.py"), str(repo)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_picture_of_the_packages_is_that_of_the_imports(copied: Path) -> None:
    done = draw(copied)
    assert done.returncode == 0, done.stderr


def test_an_import_that_the_picture_lacks_is_found_and_drawn(copied: Path) -> None:
    page = copied / "docs" / "architecture.md"
    assert "  errors\n" in page.read_text() and "storage --> dicom" not in page.read_text()
    planted = copied / "cbmir_spark" / "storage" / "planted.py"
    planted.write_text("def late() -> None:\n    from cbmir_spark.dicom import tags\n")
    assert draw(copied).returncode == 1
    assert "  storage --> dicom\n" in page.read_text()
    assert draw(copied).returncode == 0
    planted.unlink()
    assert draw(copied).returncode == 1
    assert page.read_text() == (REPO / "docs" / "architecture.md").read_text()


def test_a_page_without_the_markers_is_named(copied: Path) -> None:
    page = copied / "docs" / "architecture.md"
    page.write_text("# Architecture\n")
    done = draw(copied)
    assert done.returncode == 1 and "architecture.md lacks the lines" in done.stderr
    assert page.read_text() == "# Architecture\n"


def test_hooks_need_no_network_and_each_has_its_reason() -> None:
    lines = HOOKS.read_text().splitlines()
    config = yaml.safe_load(HOOKS.read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} <= {"system", "pygrep", "fail"}
    for hook in hooks:
        (line,) = (number for number, text in enumerate(lines) if text.strip() == f"- id: {hook['id']}")
        assert lines[line - 1].strip().startswith("# "), f"{hook['id']} has no reason beside it"


@pytest.mark.parametrize(
    ("hook", "text", "found"),
    [
        ("no-secrets", "AKIA" + "ABCDEFGHIJKLMNOP", True),
        ("no-secrets", "-----BEGIN RSA " + "PRIVATE KEY-----", True),
        ("no-secrets", "AWS_ACCESS_KEY_ID=test", False),
        ("no-local-paths", "/home/" + "someone/lake", True),
        ("no-local-paths", "WORKDIR /home/cbmir", False),
        ("no-local-paths", "pip install --extra-" + "index-url x", True),
        ("no-conflict-markers", "<<<<<<" + "< HEAD", True),
        ("no-trailing-blanks", "text \n", True),
        ("no-trailing-blanks", "text\n", False),
        ("no-dicom", "a/IM1.DCM", True),
        ("no-dicom", "dicom/read.py", False),
    ],
)
def test_a_hook_finds_what_it_is_for(hook: str, text: str, found: bool) -> None:
    (config,) = (h for repo in yaml.safe_load(HOOKS.read_text())["repos"] for h in repo["hooks"] if h["id"] == hook)
    pattern = config["files"] if config["language"] == "fail" else config["entry"]
    assert bool(re.search(pattern, text, re.MULTILINE)) is found


def spans(page: str) -> list[str]:
    """What stands in backticks on a page, outside code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))


def defined(source: str) -> set[str]:
    """The functions, classes, methods, constants and fields of a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Module | ast.ClassDef):
            for each in node.body:
                targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", None)]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def unknown_names(page: str) -> list[str]:
    """Files, and names in them (`file.py::name`), that a page mentions and the code does not have."""
    found = []
    for span in spans(page):
        path, _, name = span.partition("::")
        if not re.fullmatch(r"[\w./-]+\.(py|yaml|toml|md|sh|lock|html)", path):
            continue
        file = next((root / path for root in (REPO / "cbmir_spark", REPO) if (root / path).is_file()), None)
        if file is None or (name and name not in defined(file.read_text(encoding="utf-8"))):
            found.append(span)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_files_and_names_on_a_page_are_there(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    assert len(spans(text)) > 5
    assert unknown_names(text) == []


def test_a_name_that_is_not_there_is_found() -> None:
    page = "`dicom/tags.py::Tags` and `dicom/tags.py::read_tags`, `lake/schemas.py::TAGS`, `conf/base.yaml`, `x.y()`"
    assert unknown_names(page) == []
    assert unknown_names("`dicom/tugs.py`, `dicom/tags.py::read`") == ["dicom/tugs.py", "dicom/tags.py::read"]


def test_every_package_has_its_line() -> None:
    table = (REPO / "docs" / "architecture.md").read_text().partition("## Packages")[2].partition("##")[0]
    named = {
        span.rstrip("/") for line in table.splitlines() if line.startswith("| `") for span in spans(line.split("|")[1])
    }
    parts = {path.stem for path in (REPO / "cbmir_spark").iterdir() if not path.stem.startswith(("__", "py."))}
    assert named == parts - {"py"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (REPO / page).parent / path if path else REPO / page
        assert file.exists(), target
        if heading:
            headings = [
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            ]
            assert heading in headings, target


def reasons_in(page: str) -> dict[str, tuple[str, str]]:
    """The rows of a page's table of reasons: what each means, and what to do."""
    table = page.partition("| reason | meaning | what to do |\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    assert all(len(row) == 3 for row in rows) and len({row[0] for row in rows}) == len(rows)
    return {reason.strip("`"): (meaning, action) for reason, meaning, action in rows}


def test_the_readme_explains_each_reason_as_the_code_does() -> None:
    explained = {reason: (each.meaning, each.action) for reason, each in EXPLANATIONS.items()}
    assert reasons_in((REPO / "README.md").read_text(encoding="utf-8")) == explained


def test_the_table_of_reasons_is_found_on_a_page() -> None:
    page = (
        "| reason | meaning | what to do |\n|---|---|---|\n| `EMPTY` | It has no bytes. | Copy it again. |\n\n| x |\n"
    )
    assert reasons_in(page) == {"EMPTY": ("It has no bytes.", "Copy it again.")}
