"""Install the package as its users do, with pip into empty environments: seconds, size, packages; `make installs`.

Each of the base, [embed] and [all] is installed from a wheel of this checkout with the versions of its lock, without
pip's cache, and with the jars of Delta and S3A.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.common import REPO, keep, tell

PARTS = ("base", "embed", "all")
BIGGEST = 8


def megabytes(folder: Path) -> int:
    done = subprocess.run(["du", "-sm", str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def install(part: str, scratch: Path) -> dict[str, Any]:
    environment = scratch / part
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    started = time.monotonic()
    subprocess.run([*pip, "--require-hashes", "-r", str(REPO / "requirements" / f"{part}.lock")], check=True)
    subprocess.run([*pip, "--no-deps", str(REPO)], check=True)
    installed = time.monotonic()
    subprocess.run([str(python), str(REPO / "deploy" / "fetch_jars.py")], check=True, stdout=subprocess.DEVNULL)
    listed = subprocess.run([*pip[:3], "list", "--format=json"], capture_output=True, text=True, check=True)
    packages = {each["name"]: each["version"] for each in json.loads(listed.stdout)}
    sites = next((environment / "lib").iterdir()) / "site-packages"
    sizes = sorted(((megabytes(path), path.name) for path in sites.iterdir() if path.is_dir()), reverse=True)
    result = {
        "pip, s": round(installed - started, 1),
        "jars, s": round(time.monotonic() - installed, 1),
        "megabytes": megabytes(environment),
        "biggest, megabytes": {name: size for size, name in sizes[:BIGGEST]},
        "packages": packages,
    }
    tell(f"{part}: {result['megabytes']} MB, {result['pip, s']} s and {result['jars, s']} s, {len(packages)} packages")
    return result


def main() -> None:
    results = {}
    for part in PARTS:
        # One at a time: [all] takes 7 GB.
        with tempfile.TemporaryDirectory() as scratch:
            results[part] = install(part, Path(scratch))
    keep("installs", results)


if __name__ == "__main__":
    main()
