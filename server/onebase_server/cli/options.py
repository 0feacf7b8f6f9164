"""Options that several commands share, spelled once; and the way to the training process."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer

from onebase.errors import InvalidInput
from onebase.home import Home, default_home

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Where onebase keeps everything. Default: $ONEBASE_HOME, else ~/.onebase."),
]

HANDED_OVER: Final = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""A command's settings: all its words are for another program."""


@contextmanager
def named_by_option(options: Mapping[str, str]) -> Iterator[None]:
    """Errors name the API's fields: here they get the options' names (field -> option), and count as wrong usage."""
    try:
        yield
    except InvalidInput as error:
        field = (error.param or "").partition("[")[0].partition(".")[0]
        if field not in options:
            raise
        words = re.sub(rf"(value for )?'{field}[^']*': ", "", error.message)
        raise typer.BadParameter(words.removeprefix("Invalid "), param_hint=f"'{options[field]}'") from error


def open_home(path: Path | None) -> Home:
    """The home folder named by --home or the environment, made if it is not there."""
    home = Home((path or default_home(os.environ)).expanduser().absolute())
    home.create()
    return home


def hand_over(command: str, arguments: list[str]) -> None:
    """Become the training process, with the same standard streams and signals."""
    os.execv(sys.executable, [sys.executable, "-m", "onebase_training", command, *arguments])
