"""`cbmir`: the commands, and how any failure ends: in one line, with an exit status that is not 0."""

import errno
import os
import sys
import traceback
import warnings
from typing import Annotated

import typer

from cbmir_spark import __version__, config, log
from cbmir_spark.cli import console, jobs, upkeep
from cbmir_spark.cli.command import INTERRUPTED, Interrupted
from cbmir_spark.errors import CbmirError

# What to do about the errors of a local file system that users meet.
_REMEDIES = {
    errno.ENOENT: "create the folder that it belongs into, or give another path",
    errno.EEXIST: "give another path",
    errno.EACCES: "check its permissions and its owner",
    errno.EPERM: "check its permissions and its owner",
    errno.EROFS: "the file system is mounted read-only; give a path elsewhere",
    errno.ENOSPC: "free some space, or give a path on another disk; then run this again",
    errno.EDQUOT: "free some of the quota, or give a path elsewhere; then run this again",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOTDIR: "a folder of this path is a file; give another path",
    errno.EISDIR: "this is a folder; give the path of a file",
    errno.EIO: "the disk fails; check it, or give a path on another one",
    errno.ESTALE: "the network file system lost it; mount it again",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
}

app = typer.Typer(
    name="cbmir",
    help="Find the images of a DICOM archive that look like the ones in a list.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 3 no query answered, 75 another job holds the lake, "
    "130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(jobs.app)
app.add_typer(upkeep.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"cbmir_spark {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(job: str | None = None) -> None:
    """Run the command line; with `job`, as a spark-submit entry point that takes the flags of that command."""
    if not sys.warnoptions:
        # They come from pinned libraries, and users can do nothing about them; tests turn each one into an error.
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    arguments = sys.argv[1:] if job is None else [job, *sys.argv[1:]]
    try:
        app(args=arguments, prog_name="cbmir")
    except CbmirError as error:
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        _end(INTERRUPTED, Interrupted.exit_code)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _end(f"{place}{error.strerror}: {remedy}", 1)


def _end(line: str, status: int) -> None:
    if config.debugging():
        traceback.print_exc()
    if log.is_json():
        log.failed(line, status)
    else:
        console.err.print(f"[bold red]cbmir:[/] {console.plain(line)}", soft_wrap=True, highlight=False)
    raise SystemExit(status) from None
