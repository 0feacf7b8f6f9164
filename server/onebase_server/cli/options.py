"""Options that several commands share, spelled once."""

import os
from pathlib import Path
from typing import Annotated

import typer

from onebase.home import Home, default_home

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Where onebase keeps everything. Default: $ONEBASE_HOME, else ~/.onebase."),
]


def open_home(path: Path | None) -> Home:
    """The home folder named by --home or the environment, made if it is not there."""
    home = Home((path or default_home(os.environ)).expanduser().absolute())
    home.create()
    return home
