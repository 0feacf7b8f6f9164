"""Options that several commands share, spelled once; and the way to the training process."""

import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from onebase.home import Home, default_home

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Where onebase keeps everything. Default: $ONEBASE_HOME, else ~/.onebase."),
]

HANDED_OVER: Final = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""A command's settings: all its words are for another program."""


def open_home(path: Path | None) -> Home:
    """The home folder named by --home or the environment, made if it is not there."""
    home = Home((path or default_home(os.environ)).expanduser().absolute())
    home.create()
    return home


def hand_over(command: str, arguments: list[str]) -> None:
    """Become the training process, with the same standard streams and signals."""
    os.execv(sys.executable, [sys.executable, "-m", "onebase_training", command, *arguments])
