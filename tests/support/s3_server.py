"""A real S3 server for tests: versitygw over a folder, on 127.0.0.1, ended by its process id.

Buckets are folders below `root`, and objects are files in them, so that a test may serve what it also reads as files.
"""

import errno
import fcntl
import os
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from tests.support.tools import require_tool

VERSION = "v1.8.0"
MODULE = f"github.com/versity/versitygw/cmd/versitygw@{VERSION}"
# Accepted by that server alone. Tests put them into the environment, where production code looks for its own.
CREDENTIALS: Mapping[str, str] = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "testtest",
    "AWS_EC2_METADATA_DISABLED": "true",
}
START_SECONDS = 30


@dataclass(frozen=True)
class S3Server:
    """Where the server answers, and the folder whose subfolders are its buckets."""

    host: str
    port: int
    root: Path
    log: Path

    def read(self, bucket: str) -> list[str]:
        """The keys of a bucket that somebody has read, one for each request, as the server's access log has them."""
        return re.findall(rf" {bucket} \[[^]]*\] \S+ \S+ \S+ s3_GetObject (\S+) ", self.log.read_text(errors="replace"))

    def requests(self, bucket: str) -> Counter[str]:
        """The number of requests to a bucket, by operation, as the server's access log has them."""
        log = self.log.read_text(errors="replace")
        return Counter(re.findall(rf" {bucket} \[[^]]*\] \S+ \S+ \S+ s3_(\w+) ", log))

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def bucket(self, name: str) -> Path:
        """A new, empty bucket."""
        folder = self.root / name
        folder.mkdir()
        return folder


def binary() -> Path:
    """versitygw from the PATH, or built once into the user's cache. Without Go, see `require_tool`."""
    found = shutil.which("versitygw")
    if found:
        return Path(found)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cbmir-spark" / f"versitygw-{VERSION}"
    target = cache / "versitygw"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            go = require_tool("versitygw", "go")
            # Built beside its place: a build that is cut short leaves nothing that looks finished.
            unfinished = cache / "building"
            built = subprocess.run(
                [go, "install", MODULE], env=os.environ | {"GOBIN": str(unfinished)}, capture_output=True, text=True
            )
            assert built.returncode == 0, built.stderr
            (unfinished / "versitygw").rename(target)
    return target


@contextmanager
def running(folder: Path) -> Iterator[S3Server]:
    """A server over `folder/buckets` until the block ends."""
    root = folder / "buckets"
    root.mkdir(parents=True)
    access = folder / "access.log"
    command = [str(binary()), "--quiet", "--keep-alive", "--access-log", str(access), "--port"]
    environment = os.environ | {
        "ROOT_ACCESS_KEY": CREDENTIALS["AWS_ACCESS_KEY_ID"],
        "ROOT_SECRET_KEY": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    }
    with (folder / "log").open("wb") as log:
        port = _free_port()
        process = subprocess.Popen(
            [*command, f"127.0.0.1:{port}", "posix", *_metadata(folder), str(root)],
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            _wait_until_it_listens(process, port, folder / "log")
            yield S3Server("127.0.0.1", port, root, access)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _metadata(folder: Path) -> list[str]:
    """Where ETags are kept: in extended attributes, or in a folder of their own where the file system has none."""
    try:
        os.setxattr(folder, "user.test", b"")
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        sidecar = folder / "metadata"
        sidecar.mkdir()
        return ["--sidecar", str(sidecar)]
    return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.05)


def reach(spark: SparkSession, bucket: str, endpoint: str) -> None:
    """Tell the suite's session, which started before the server, where one bucket is."""
    jvm: Any = spark.sparkContext._jsc
    hadoop = jvm.hadoopConfiguration()
    for key, value in {"endpoint": endpoint, "connection.ssl.enabled": "false"}.items():
        hadoop.set(f"fs.s3a.bucket.{bucket}.{key}", value)
