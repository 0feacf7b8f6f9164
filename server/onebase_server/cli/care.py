"""`onebase doctor`, `backup` and `restore`: looking after a machine and a home folder."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from onebase.home import Home, default_home
from onebase_server.backup import back_up
from onebase_server.backup import restore as restore_home
from onebase_server.cli.options import HomeOption, open_home
from onebase_server.doctor import examine
from onebase_server.settings import load_settings

console = Console()
MARKS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[bold red]fail[/]"}


def doctor(
    whole: Annotated[bool, typer.Option("--whole", help="Also read every byte of bases and adapters.")] = False,
    home: HomeOption = None,
) -> None:
    """Check the machine, the settings and the home folder; exit code 1 if something is broken."""
    settings = load_settings(os.environ, {"home": home})
    failed = False
    for finding in examine(settings, whole=whole):
        failed |= finding.verdict == "fail"
        console.print(f"{MARKS[finding.verdict]} {finding.what}: {finding.words}", highlight=False, soft_wrap=True)
    raise typer.Exit(int(failed))


def backup(
    target: Annotated[Path, typer.Argument(help="A new .tar or .tar.gz.")],
    bases: Annotated[bool, typer.Option("--bases", help="With the base models too.")] = False,
    home: HomeOption = None,
) -> None:
    """Write adapters, files, runs, the audit log and the SQLite database to one file; the server may run."""
    size = back_up(open_home(home), target, with_bases=bases)
    console.print(f"wrote {target}, {size / 1e6:,.1f} MB", highlight=False)


def restore(
    source: Annotated[Path, typer.Argument(help="What `onebase backup` wrote.")],
    home: HomeOption = None,
) -> None:
    """Unpack a backup into a home folder that is empty or not there yet."""
    folder = Home((home or default_home(os.environ)).expanduser().absolute())
    names = restore_home(source, folder)
    console.print(f"restored {', '.join(names)} to {folder.root}", highlight=False)
