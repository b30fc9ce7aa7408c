"""Which processes a test has started, and theirs."""

import contextlib
import time
from pathlib import Path


def below(root: int, word: str) -> list[int]:
    """Ids of the processes that descend from one and whose command line holds the word."""
    parents, lines = {}, {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                lines[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
    found, todo = [], [root]
    while todo:
        here = [pid for pid, parent in parents.items() if parent in todo]
        found += [pid for pid in here if word in lines.get(pid, "")]
        todo = here
    return found


def wait_for_end(word: str, seconds: float = 60.0) -> None:
    """Wait until no process has the word in its command line. Raises TimeoutError."""
    ends = time.monotonic() + seconds
    while below(1, word):
        if time.monotonic() > ends:
            raise TimeoutError(f"a process with {word} in its command line still runs after {seconds:.0f} s")
        time.sleep(0.1)
