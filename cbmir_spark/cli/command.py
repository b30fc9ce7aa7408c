"""What all commands share: settings from files, flags and the environment, a lake, and how results are shown.

A command is a function of a few lines that gets a `Call`, and flags that set settings. `register` adds the common
options, applies the flags, and passes everything else on.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from cbmir_spark import config, log
from cbmir_spark.api import Lake
from cbmir_spark.cli import console
from cbmir_spark.config import Settings
from cbmir_spark.errors import CbmirError
from cbmir_spark.spark import interrupts

# Help panels, in the order of a day's work.
JOBS, ANSWERS, UPKEEP, SETUP = "Jobs", "Results", "Upkeep", "Setup"


def flag(key: str, *names: str) -> Any:
    """Make an option that sets `key`: `Annotated[str | None, flag("retrieval.k")]`; its help is the setting's.

    Values stay text here, since the settings check them; a flag of a switch can only turn it on.
    """
    text = config.describe(key)
    option = typer.Option(*names, help=text[:1].upper() + text[1:] + ".")
    option.setting = key
    return option


INTERRUPTED = "interrupted; run the same command again to continue"


class Interrupted(CbmirError):
    """Ctrl-C."""

    exit_code = 130


@dataclass(frozen=True)
class Call:
    """One invocation of a command: its settings, and whether its result is printed as JSON."""

    settings: Settings
    as_json: bool

    @contextmanager
    def lake(self) -> Iterator[Lake]:
        """The lake of the settings; its Spark session ends with the block."""
        with interrupts.as_keyboard_interrupt(), lake_for(self.settings) as lake:
            yield lake

    def show(self, result: Any, view: Callable[[Any], None]) -> None:
        """Print a result: as JSON if asked, else by `view`."""
        if self.as_json:
            console.print_json(result)
        else:
            view(result)


def lake_for(settings: Settings) -> Lake:
    """Make the lake that a command works on; tests put in one that shares their Spark session."""
    return Lake(settings)


ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings file over conf/base.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set section.key=value; repeatable.")
]
LakeUri = Annotated[
    str | None, typer.Option("--lake", metavar="URI", help="Folder or s3a: prefix of the tables; default: lake.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Log to stderr as JSON lines.")]
_COMMON = {"config": ConfigFile, "overrides": Overrides, "lake": LakeUri, "as_json": AsJson, "log_json": LogJson}
_DEFAULTS: Mapping[str, Any] = {"config": None, "overrides": None, "lake": None, "as_json": False, "log_json": False}


def register(
    app: typer.Typer, panel: str, name: str | None = None, with_lake: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function as a command of `app`, in a panel of its help.

    The function's first parameter is the `Call`; its other parameters are the command's flags, of which those made by
    `flag` are applied to the settings and not passed on.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        parameters = list(inspect.signature(function).parameters.values())[1:]
        keys = {p.name: key for p in parameters if (key := _key_of(p.annotation)) is not None}
        common = {key: value for key, value in _COMMON.items() if with_lake or key != "lake"}

        def command(**values: Any) -> None:
            given = {key: values.pop(key, _DEFAULTS[key]) for key in _COMMON}
            log.configure(json=given["log_json"])
            flags = {"lake.uri": given["lake"]} | {key: values.pop(name) for name, key in keys.items()}
            chosen = [f"{key}={_as_text(value)}" for key, value in flags.items() if value not in (None, False)]
            try:
                settings = config.load(given["config"], [*(given["overrides"] or []), *chosen])
                function(Call(settings, given["as_json"]), **values)
            except KeyboardInterrupt:
                raise Interrupted(INTERRUPTED) from None

        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [p.replace(kind=keyword) for p in parameters]
        shared = [inspect.Parameter(n, keyword, default=_DEFAULTS[n], annotation=a) for n, a in common.items()]
        command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        command.__annotations__ = {}
        app.command(name, rich_help_panel=panel)(command)
        return function

    return add


def _key_of(annotation: Any) -> str | None:
    marks = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((mark.setting for mark in marks if hasattr(mark, "setting")), None)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def write(text: str) -> None:
    """Write to standard output as it is, without rich's wrapping."""
    sys.stdout.write(text)
