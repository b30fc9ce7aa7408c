"""What the benchmarks share: where results go, what machine they are of, and a line for who waits."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPO = HERE.parent.parent
SHARED = REPO.parent / "shared" / "data"
_RESULTS = HERE / "results.json"


def keep(name: str, result: dict[str, Any]) -> None:
    """Put a result in the place of the last one of its name, with the day and the machine."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    results = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    results[name] = {"date": datetime.now(UTC).date().isoformat(), "machine": machine} | result
    _RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def tell(line: str) -> None:
    # Codecs write to the standard error of whoever calls them, so a bench may have closed Python's own.
    os.write(2, (line + "\n").encode())
