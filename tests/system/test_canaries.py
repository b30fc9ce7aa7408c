"""Nothing that identifies a person leaves the vault: the whole chain, over an archive full of canaries."""

import base64
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import urllib.parse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import yaml
from pydicom.datadict import dictionary_VR, keyword_for_tag

from tests.conftest import REPO
from tests.support import canaries
from tests.support.canaries import KANJI, KEPT, LATIN, Scanner, Tokens
from tests.support.leaks import contents
from tests.support.processes import wait_for_end

pytestmark = pytest.mark.more

FILES = [pytest.param(24, id="ci"), pytest.param(200, id="soak", marks=pytest.mark.soak)]


@dataclass(frozen=True)
class Chain:
    """Where a run of all jobs left its files; `open` is everything outside archive and vault."""

    root: Path
    open: Path
    tokens: Tokens
    files: int
    output: str


@pytest.fixture(scope="module", params=FILES)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """Ingest, train, index, retrieve with a gallery, evaluate, a second night and an erasure, in another process."""
    root = tmp_path_factory.mktemp("canaries")
    left = root / "open"
    for folder in ("archive", "vault", "open/tmp", "open/local", "open/events", "open/cwd"):
        (root / folder).mkdir(parents=True)
    tokens = canaries.fill(root / "archive", request.param)
    images = sorted((root / "archive").glob("*/*W.dcm"))
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in images[:2]]
    asked = [f"file{number},{path}," for number, path in enumerate(images[:3])]
    asked += [f"uid{number},,{ds.SOPInstanceUID}" for number, ds in enumerate(headers)]
    asked += [
        f"absent,{root}/archive/{tokens.text()}.dcm,",
        f"outside,/{tokens.text()}/x.dcm,",
        f"text,{next((root / 'archive').glob('*.txt'))},",
        f"unknown,,{tokens.uid()}",
        f"bad,,{tokens.text()}",
        f"more,{images[3]},,{tokens.text()}",
    ]
    (root / "queries.csv").write_text("\n".join(["query_id,uri,sop_instance_uid", *asked]), encoding="utf-8")
    (root / "list.csv").write_text(f"kind,identifier\npatient,{headers[0].PatientID}\nstudy,{tokens.uid()}\n")
    site = {
        "lake": {"uri": str(left / "lake"), "vault": str(root / "vault")},
        "privacy": {"identity": True},
        "ingest": {"archive": str(root / "archive"), "max_object_mb": 1, "files_per_task": 16},
        "dataset": {"min_images": 4, "rows_per_group": 8},
        "training": {"epochs": 1},
        "retrieval": {"queries": str(root / "queries.csv"), "prefilter": "none"},
        "evaluation": {"prefilters": ["none", "tags"]},
        "spark": {
            "master": "local[2]",
            "driver_memory": "2g",
            # As verbose as when somebody looks for a fault.
            "log_level": "INFO",
            "conf": {
                "spark.eventLog.enabled": "true",
                "spark.eventLog.dir": (left / "events").as_uri(),
                "spark.eventLog.compress": "true",
                "spark.local.dir": str(left / "local"),
                "spark.sql.warehouse.dir": str(left / "warehouse"),
                "spark.driver.extraJavaOptions": (
                    f"-Djava.io.tmpdir={left / 'tmp'} -XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m"
                ),
                "spark.sql.shuffle.partitions": "2",
                "spark.databricks.delta.snapshotPartitions": "2",
                "spark.sql.codegen.wholeStage": "false",
                "spark.sql.codegen.factoryMode": "NO_CODEGEN",
            },
        },
    }
    (root / "site.yaml").write_text(yaml.safe_dump(site))
    nights = ["ingest", "train", "index", "retrieve", "evaluate", "forget", "ingest"]
    commands = [[job, "--config", str(root / "site.yaml"), "--log-json"] for job in nights]
    commands[5] += ["--list", str(root / "list.csv"), "--now"]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.canary_chain", json.dumps(commands)],
        cwd=left / "cwd",
        env={**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(left / "tmp"), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        timeout=1500,
        check=False,
    )
    # Java outlives the driver for a moment, in which it removes its temporary files.
    wait_for_end(f"-Djava.io.tmpdir={left / 'tmp'}")
    (left / "stdout").write_bytes(ran.stdout)
    (left / "stderr").write_bytes(ran.stderr)
    output = ran.stdout.decode("utf-8", "replace")
    assert ran.returncode == 0 and output.count("= 0\n") == len(nights), output + ran.stderr.decode()[-4000:]
    yield Chain(root, left, tokens, request.param, output)


@pytest.mark.timeout(1800)
def test_no_canary_leaves_the_vault(chain: Chain) -> None:
    scanner = Scanner(chain.tokens)
    names, found, size = set(), {}, 0
    for name, content in contents(chain.open):
        names.add(name.split("/")[0])
        size += len(content)
        # Logs count nanoseconds, which may look like days.
        days = not name.startswith(("events/", "stderr"))
        if hits := scanner.find(content, days):
            found[name] = hits[:3]
    assert not found, json.dumps(found, indent=1)
    assert {"lake", "events", "stdout", "stderr"} <= names and size > 10_000_000
    printed = (chain.open / "stderr").read_text("utf-8", "replace").splitlines()
    logged = [json.loads(line) for line in printed if '"logger": "cbmir_spark' in line]
    assert {line.get("job") for line in logged} >= {"ingest", "train", "index", "retrieve", "evaluate", "forget"}
    pages = [path.name for path in (chain.open / "lake").rglob("*.html")]
    assert "gallery.html" in pages and len(pages) > 1
    assert any("SparkListenerTaskEnd" in text.decode("utf-8", "replace") for _, text in contents(chain.open / "events"))
    assert list((chain.open / "lake").rglob("mlflow.db")) or list((chain.open / "lake").rglob("*.db"))


def test_the_vault_holds_what_the_lake_must_not(chain: Chain) -> None:
    """So the canaries were read, and the scanner sees them in tables."""
    scanner = Scanner(chain.tokens)
    seen = {
        name.split("/")[0]: hits for name, content in contents(chain.root / "vault") if (hits := scanner.find(content))
    }
    assert {"sources", "identity"} <= set(seen)
    assert any(hit for hit in seen["sources"])
    unpacked = b"".join(c for name, c in contents(chain.root / "vault" / "sources") if "unpacked" in name).decode()
    assert KANJI in unpacked and LATIN in unpacked
    # Nearly all of the sound images were taken in; the malformed objects went every way there is.
    sound = chain.output.split("$ cbmir train")[0]
    for reason in ("MALFORMED", "NO_UID", "NOT_DICOM", "TRUNCATED", "TOO_LARGE", "EMPTY", "UNSUPPORTED"):
        assert reason in sound, sound


def test_every_attribute_has_a_canary(tmp_path: Path) -> None:
    tokens = canaries.fill(tmp_path, 24)
    tags = canaries.attributes()
    assert len(tags) > 4700 and tokens.count > 10_000
    found: set[int] = set()
    for path in {*tmp_path.glob("*/*W.dcm"), *tmp_path.glob("*/*%20.dcm")}:
        found |= {int(element.tag) for element in pydicom.dcmread(path)}
    small = {"AT", "NONE"}  # two bytes of a tag, delimiters: no room for a value
    missing = [keyword_for_tag(tag) for tag in set(tags) - found if dictionary_VR(tag) not in small]
    assert not missing, missing
    # What the profile removes and TAGS keeps in part: sex, and years of age.
    assert {"PatientSex", "PatientAge"} <= set(KEPT)
    for keyword in ("PatientName", "PatientID", "StudyDate", "InstitutionName", "OperatorsName", "DeviceSerialNumber"):
        assert keyword not in KEPT


@pytest.fixture(scope="module")
def some() -> tuple[Tokens, dict[str, str]]:
    tokens = Tokens()
    values = {
        "text": tokens.text(),
        "name": tokens.name("ISO_IR 100"),
        "uid": tokens.uid(),
        "date": tokens.day(),
        "real date": tokens.day(real=True),
        "number": str(tokens.number()),
        "negative": str(tokens.number(-1)),
        "decimal": tokens.decimal(),
        "time": tokens.time(),
        "name in kanji": tokens.name("ISO 2022 IR 87").split("=")[1],
        "name in UTF-8": tokens.name("ISO_IR 192"),
    }
    return tokens, values


NOISE = b"id-%d 0.739100001 73914827 2026-11-23 7391000019 A\xc3\x9e\xff"


@pytest.mark.parametrize("before", ["", "x", "xy", "xyz", '{"a": "', "path/"])
def test_the_scanner_finds_a_value_in_every_form(some: tuple[Tokens, dict[str, str]], before: str) -> None:
    tokens, values = some
    scanner = Scanner(tokens)
    assert scanner.find(NOISE) == []
    for kind, value in values.items():
        plain = value.encode("utf-8")
        start = before.encode()
        glued = start if not start or not start[-1:].isalnum() else start + b" "
        forms = {
            "plain": glued + plain,
            "base64": start + base64.b64encode(b"k=" + plain) if before != "x" else base64.b64encode(plain),
            "URL-safe base64": base64.urlsafe_b64encode(b"\xff\xfe" + plain),
            "hex": glued + plain.hex().encode(),
            "HEX": glued + plain.hex().upper().encode(),
            "SHA-256": hashlib.sha256(plain).hexdigest().encode(),
        }
        if kind.startswith(("text", "name", "uid")):
            forms["lower"] = glued + value.lower().encode("utf-8")
            forms["UTF-16"] = value.encode("utf-16")
            forms["UTF-16 big endian"] = value.encode("utf-16-be")
        if kind == "name":
            family, given = value.split("^")
            forms["reversed"] = f"{given} {family}".encode()
            forms["family alone"] = family.encode("latin-1")
            forms["hash of the name as written"] = hashlib.sha256(f"{family} {given}".encode()).hexdigest().encode()
        if "kanji" in kind:
            forms |= {code: value.encode(code) for code in ("iso2022_jp", "shift_jis", "euc_jp")}
            forms |= {"JSON": json.dumps(value).encode(), "URL": urllib.parse.quote(value).encode()}
        for form, content in forms.items():
            assert scanner.find(NOISE + b" " + content + b" " + NOISE), (kind, form, content)


def test_the_scanner_looks_into_what_is_packed(some: tuple[Tokens, dict[str, str]], tmp_path: Path) -> None:
    tokens, values = some
    token = values["text"]
    column = pa.array([None, [{"a": {"k": token}}]], pa.list_(pa.struct([("a", pa.map_(pa.string(), pa.string()))])))
    pq.write_table(pa.table({"nested": column}), tmp_path / "p.parquet", compression="zstd")
    pq.write_table(pa.table({"b": pa.array([token.encode()])}), tmp_path / "b.parquet", use_dictionary=True)
    (tmp_path / "log.gz").write_bytes(gzip.compress(token.encode()))
    (tmp_path / "members.gz").write_bytes(
        gzip.compress(b"a" * 99) + gzip.compress(random.randbytes(200_000)) + gzip.compress(token.encode())
    )
    (tmp_path / "cut.gz").write_bytes(gzip.compress(token.encode() * 2 + random.randbytes(1000))[:-300])
    for number, start in enumerate((b"\x1f\x8b", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd")):
        (tmp_path / f"noise{number}").write_bytes(start + bytes(range(255, 200, -1)) + token.encode())
    with pa.CompressedOutputStream(str(tmp_path / "log.zstd"), "zstd") as stream:
        stream.write(b"{" * 1000 + token.encode())
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x", gzip.compress(token.encode()))
    (tmp_path / token).mkdir()
    scanner = Scanner(tokens)
    seen = {name.partition(" ")[0] for name, content in contents(tmp_path) if scanner.find(content)}
    packed = {"log.gz", "members.gz", "cut.gz", "log.zstd", "a.zip"}
    assert seen == {"", "p.parquet", "b.parquet", "noise0", "noise1", "noise2", *packed}
