"""Install the package into empty environments: seconds, size, packages; `make installs`.

Each of the base, [embed] and [all] is installed from a wheel of this checkout with the versions of its lock, without a
cache, by uv; the base also by pip. The jars of Delta and S3A follow.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.common import REPO, keep, tell

PARTS = (("base", "pip"), ("base", "uv"), ("embed", "uv"), ("all", "uv"))
BIGGEST = 8


def megabytes(folder: Path) -> int:
    done = subprocess.run(["du", "-sm", str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def install(part: str, tool: str, scratch: Path) -> dict[str, Any]:
    environment = scratch / part
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--no-cache", "--python", str(python)]
    started = time.monotonic()
    lock = ["--require-hashes", "-r", str(REPO / "requirements" / f"{part}.lock")]
    subprocess.run([*(uv if tool == "uv" else pip), *lock], check=True)
    subprocess.run([*pip, "--no-deps", str(REPO)], check=True)
    installed = time.monotonic()
    subprocess.run([str(python), str(REPO / "deploy" / "fetch_jars.py")], check=True, stdout=subprocess.DEVNULL)
    listed = subprocess.run([*pip[:3], "list", "--format=json"], capture_output=True, text=True, check=True)
    packages = {each["name"]: each["version"] for each in json.loads(listed.stdout)}
    sites = next((environment / "lib").iterdir()) / "site-packages"
    sizes = sorted(((megabytes(path), path.name) for path in sites.iterdir() if path.is_dir()), reverse=True)
    result = {
        f"{tool}, s": round(installed - started, 1),
        "jars, s": round(time.monotonic() - installed, 1),
        "megabytes": megabytes(environment),
        "biggest, megabytes": {name: size for size, name in sizes[:BIGGEST]},
        "packages": packages,
    }
    seconds = f"{result[f'{tool}, s']} s and {result['jars, s']} s"
    tell(f"{part} by {tool}: {result['megabytes']} MB, {seconds}, {len(packages)} packages")
    return result


def main() -> None:
    results = {}
    for part, tool in PARTS:
        # One at a time: [all] takes 7 GB.
        with tempfile.TemporaryDirectory() as scratch:
            results[f"{part} by {tool}"] = install(part, tool, Path(scratch))
    keep("installs", results)


if __name__ == "__main__":
    main()
