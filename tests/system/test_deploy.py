"""What is deployed, checked without a cluster: image, entry point, manifests, submit script, settings files."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import jsonschema
import pyspark
import pytest
import yaml

from cbmir_spark import config
from tests.support.tools import require_tool

REPO = Path(__file__).resolve().parents[2]
DEPLOY = REPO / "deploy"
MANIFESTS = DEPLOY / "k8s"
JOBS = ("ingest", "train", "index", "retrieve", "evaluate")
SCHEMA = REPO.parent / "shared" / "schemas" / "sparkapplication_v1beta2.json"
SPARK_HOME = Path(pyspark.__file__).parent
TOOLS = Path(sysconfig.get_path("scripts"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def application(job: str) -> dict[str, Any]:
    (document,) = documents(MANIFESTS / f"{job}.yaml")
    return document


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    if not SCHEMA.is_file():
        pytest.skip(f"the operator's schema is not at {SCHEMA}")
    loaded: dict[str, Any] = json.loads(SCHEMA.read_text())
    return loaded


def run(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, timeout=120)


def test_dockerfile_has_no_findings() -> None:
    done = run(TOOLS / "hadolint", DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_dockerfile_copies_only_what_the_build_context_has() -> None:
    """`.dockerignore` shuts everything out but a list; a COPY of anything else would fail at build time only."""
    allowed = {
        line.removeprefix("!") for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copies = [line.split()[1:-1] for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line[:5] == "COPY "]
    sources = {source for parts in copies if not parts[0].startswith("--from") for source in parts}
    assert sources
    for source in sources:
        assert (REPO / source).exists(), source
        assert any(source == entry or source.startswith(f"{entry}/") for entry in allowed), source


@pytest.mark.parametrize(
    "script", [*(f"deploy/{name}.sh" for name in ("entrypoint", "submit", "check_machine", "gpus")), ".ci/run"]
)
def test_scripts_pass_shellcheck(script: str) -> None:
    done = run(require_tool("shellcheck"), REPO / script)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "a master and a job are needed"),
        (["spark://127.0.0.1:7077"], "a master and a job are needed"),
        (["local[2]", "ingest"], "must look like spark://HOST:PORT"),
        (["spark://127.0.0.1:7077", "shred"], "there is no job shred"),
    ],
)
def test_submit_says_how_to_use_it(arguments: list[str], complaint: str) -> None:
    done = run(DEPLOY / "submit.sh", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert complaint in done.stderr.splitlines()[0]
    assert "usage: deploy/submit.sh" in done.stderr


def test_submit_names_a_python_without_spark(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    done = run(DEPLOY / "submit.sh", "spark://127.0.0.1:7077", "ingest", env={**os.environ, "PYTHON": str(bare)})
    assert done.returncode == 2
    assert f"{bare} has no pyspark" in done.stderr


def test_submit_knows_every_job() -> None:
    # The demo keeps its archive in a folder beside it, which workers elsewhere do not see.
    known = {path.stem for path in (REPO / "jobs").glob("*.py")} - {"demo"}
    accepted = re.search(r"^  ([a-z |]+)\) ;;$", (DEPLOY / "submit.sh").read_text(), re.MULTILINE)
    assert accepted
    assert set(accepted[1].split(" | ")) == known
    # A person runs these once, after the vocabulary or the version changed, so no manifest schedules them.
    assert known - {"remap", "upgrade"} == set(JOBS)


def container(**variables: str) -> dict[str, str]:
    """The environment that the image gives, with this machine's Spark in the place of the image's."""
    return {
        "PATH": f"{TOOLS}:{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", "/tmp"),
        "SPARK_HOME": str(SPARK_HOME),
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        **({"JAVA_HOME": os.environ["JAVA_HOME"]} if "JAVA_HOME" in os.environ else {}),
        **variables,
    }


def test_entrypoint_runs_a_driver_as_spark_on_kubernetes_starts_it(tmp_path: Path) -> None:
    """The command line is the one Spark composes for a driver pod; only the master is of this machine."""
    properties = tmp_path / "spark.properties"
    properties.write_text("spark.master local[1]\nspark.app.name from-the-operator\nspark.ui.enabled false\n")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from pyspark.sql import SparkSession\n"
        "spark = SparkSession.builder.getOrCreate()\n"
        "conf = spark.sparkContext.getConf()\n"
        "print('SEEN', conf.get('spark.app.name'), conf.get('spark.driver.bindAddress'), spark.range(5).count(),\n"
        "      *sys.argv[1:])\n"
        "spark.stop()\n"
    )
    done = run(
        DEPLOY / "entrypoint.sh", "driver",
        "--properties-file", properties,
        "--class", "org.apache.spark.deploy.PythonRunner",
        f"local://{program}", "--archive", "a b",
        env=container(SPARK_DRIVER_BIND_ADDRESS="127.0.0.1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SEEN from-the-operator 127.0.0.1 5 --archive a b" in done.stdout


def test_entrypoint_starts_an_executor_that_calls_its_driver() -> None:
    """Nobody listens at the driver's address, so the real executor must get as far as saying so."""
    done = run(
        DEPLOY / "entrypoint.sh",
        "executor",
        env=container(
            SPARK_DRIVER_URL="spark://CoarseGrainedScheduler@127.0.0.1:1",
            SPARK_EXECUTOR_ID="1",
            SPARK_EXECUTOR_CORES="1",
            SPARK_EXECUTOR_MEMORY="512m",
            SPARK_APPLICATION_ID="spark-test",
            SPARK_EXECUTOR_POD_IP="127.0.0.1",
            SPARK_EXECUTOR_POD_NAME="executor-1",
            SPARK_RESOURCE_PROFILE_ID="0",
            SPARK_JAVA_OPT_0="-Dspark.network.timeout=10s",
            SPARK_JAVA_OPT_1="-Dspark.note=two words",
        ),
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "KubernetesExecutorBackend" in said
    assert "Failed to connect to /127.0.0.1:1" in said, said[-2000:]


def test_entrypoint_runs_anything_else_as_it_stands() -> None:
    done = run(DEPLOY / "entrypoint.sh", "printf", "%s|", "one two", "three", env=container())
    assert (done.returncode, done.stdout) == (0, "one two|three|")
    assert run(DEPLOY / "entrypoint.sh", env=container()).returncode == 2


@pytest.mark.parametrize("job", JOBS)
def test_spark_applications_are_what_the_operator_takes(job: str, schema: dict[str, Any]) -> None:
    jsonschema.validate(application(job), schema)


def test_the_schema_is_strict(schema: dict[str, Any]) -> None:
    """Guards the test above: a schema that let a typing slip pass would prove nothing."""
    document = application("ingest")
    document["spec"]["executor"]["memoryOverheat"] = "1g"
    with pytest.raises(jsonschema.ValidationError, match="memoryOverheat"):
        jsonschema.validate(document, schema)


@pytest.mark.parametrize("job", JOBS)
def test_spark_applications_run_our_jobs(job: str) -> None:
    document = application(job)
    assert (document["apiVersion"], document["kind"]) == ("sparkoperator.k8s.io/v1beta2", "SparkApplication")
    spec = document["spec"]
    assert spec["mainApplicationFile"] == f"local:///opt/cbmir/jobs/{job}.py"
    assert (REPO / "jobs" / f"{job}.py").is_file()
    # The image is built from the current stack, whichever runs this test.
    assert f"\npyspark=={spec['sparkVersion']} " in (REPO / "requirements" / "current.lock").read_text()
    (mounted,) = spec["driver"]["configMaps"]
    assert spec["arguments"][:2] == ["--config", f"{mounted['path']}/cluster.yaml"]
    for side in ("driver", "executor"):
        assert spec[side]["env"] == [
            {
                "name": "CBMIR_PRIVACY__KEY",
                "valueFrom": {"secretKeyRef": {"name": "cbmir-pseudonyms", "key": "key"}},
            }
        ]
        assert spec[side]["envFrom"] == [{"secretRef": {"name": "cbmir-storage"}}]
        assert spec[side]["podSecurityContext"]["runAsNonRoot"] is True
        assert spec[side]["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("job", JOBS)
def test_the_arguments_are_ones_the_job_takes(job: str) -> None:
    """`--help` after real flags is not enough (click prints it first), so the flags are looked up in it."""
    done = run(sys.executable, REPO / "jobs" / f"{job}.py", "--help", env=container(COLUMNS="200", TERM="dumb"))
    assert done.returncode == 0, done.stderr[-2000:]
    for argument in application(job)["spec"]["arguments"]:
        if argument.startswith("--"):
            assert argument in done.stdout


def test_every_night_is_the_same_ingest_and_never_two_at_once() -> None:
    (nightly,) = documents(MANIFESTS / "nightly-ingest.yaml")
    assert nightly["kind"] == "ScheduledSparkApplication"
    assert nightly["spec"]["concurrencyPolicy"] == "Forbid"
    once = application("ingest")["spec"]
    del once["timeToLiveSeconds"]  # the schedule's own history limits decide
    assert nightly["spec"]["template"] == once


def test_no_name_becomes_a_setting() -> None:
    """A service `cbmir-x` puts CBMIR_X_SERVICE_HOST into every pod, which config.py must take for a setting."""
    for path in [*(MANIFESTS / f"{job}.yaml" for job in JOBS), MANIFESTS / "nightly-ingest.yaml"]:
        metadata = documents(path)[0]["metadata"]
        name = metadata.get("name") or metadata["generateName"]
        assert not name.upper().replace("-", "_").startswith(config.ENVIRONMENT_PREFIX)
    assert not [d for d in documents(MANIFESTS / "base.yaml") if d["kind"] == "Service"]


def test_core_manifests_are_valid() -> None:
    done = run(TOOLS / "kubernetes-validate", "--strict", MANIFESTS / "base.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_secret_is_in_a_manifest() -> None:
    for path in MANIFESTS.glob("*.yaml"):
        assert not [document for document in documents(path) if document["kind"] == "Secret"], path


def test_every_name_that_a_job_mounts_or_runs_as_is_there() -> None:
    base = documents(MANIFESTS / "base.yaml")
    names = {(document["kind"], document["metadata"]["name"]) for document in base}
    for job in JOBS:
        document = application(job)
        spec = document["spec"]
        assert ("Namespace", document["metadata"]["namespace"]) in names
        assert ("ConfigMap", spec["driver"]["configMaps"][0]["name"]) in names
        for side in ("driver", "executor"):
            assert ("ServiceAccount", spec[side]["serviceAccount"]) in names
    (binding,) = [document for document in base if document["kind"] == "RoleBinding"]
    assert [subject["name"] for subject in binding["subjects"]] == ["cbmir-driver"]


def test_the_config_map_carries_the_settings_file_as_it_stands() -> None:
    (settings,) = [d for d in documents(MANIFESTS / "base.yaml") if d["kind"] == "ConfigMap"]
    assert settings["data"] == {"cluster.yaml": (REPO / "conf" / "cluster.yaml").read_text()}


def test_the_cluster_settings_hold_differences_only() -> None:
    file = REPO / "conf" / "cluster.yaml"
    base = config.load(environ={}).model_dump()
    changed = config.load(file, environ={}).model_dump()
    for section, values in yaml.safe_load(file.read_text()).items():
        for key in values:
            assert changed[section][key] != base[section][key], f"{section}.{key} is what base.yaml says"


def test_cluster_settings_name_no_secret_and_a_tracking_server() -> None:
    settings = config.load(REPO / "conf" / "cluster.yaml", environ={})
    assert settings.privacy.key is None
    assert settings.lake.vault is not None
    assert not settings.lake.vault.startswith(settings.lake.uri)
    assert settings.mlflow.tracking_uri is not None


def test_the_discovery_script_lists_gpus_as_spark_reads_them(tmp_path: Path) -> None:
    """As Spark's ResourceInformation parses it; without the driver, or without a GPU, it says what is missing."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(0o755)
    there = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = run(DEPLOY / "gpus.sh", env=there)
    assert json.loads(found.stdout) == {"name": "gpu", "addresses": ["0", "1"]}
    tool.write_text("#!/bin/sh\n")
    none = run(DEPLOY / "gpus.sh", env=there)
    assert none.returncode == 1 and "finds no GPU" in none.stderr
    tool.unlink()
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "env", "hostname"):
        (bare / name).symlink_to(shutil.which(name) or name)
    missing = run(DEPLOY / "gpus.sh", env={"PATH": str(bare)})
    assert missing.returncode == 1 and "no nvidia-smi" in missing.stderr
