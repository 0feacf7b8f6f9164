"""`onebase doctor`, `backup` and `restore`: looking after a machine and a home folder."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from onebase.home import Home, default_home
from onebase_server.backup import back_up
from onebase_server.backup import restore as restore_home
from onebase_server.cli.options import HomeOption
from onebase_server.doctor import examine
from onebase_server.records.homes import FILE as HOME_ID
from onebase_server.settings import load_settings

console = Console()
MARKS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[bold red]fail[/]"}


def doctor(
    whole: Annotated[bool, typer.Option("--whole", help="Also read every byte of bases and adapters.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
    home: HomeOption = None,
) -> None:
    """Check the machine, the settings and the home folder, changing nothing; exit code 1 if something is broken."""
    settings = load_settings(os.environ, {"home": home})
    found = []
    for finding in examine(settings, whole=whole):
        found.append(finding)
        if not as_json:
            words = escape(f"{finding.what}: {finding.words}")
            console.print(f"{MARKS[finding.verdict]} {words}", highlight=False, soft_wrap=True)
    failed = any(finding.verdict == "fail" for finding in found)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}, indent=1))
    raise typer.Exit(int(failed))


def backup(
    target: Annotated[Path, typer.Argument(help="A new .tar or .tar.gz.")],
    bases: Annotated[bool, typer.Option("--bases", help="With the base models too.")] = False,
    home: HomeOption = None,
) -> None:
    """Write adapters, files, runs, the audit log and the SQLite database to one file; the server may run."""
    settings = load_settings(os.environ, {"home": home})
    if settings.home.root.is_dir():
        settings.home.create()
    size = back_up(settings.home, target, with_bases=bases)
    console.print(f"wrote {escape(str(target))}, {size / 1e6:,.1f} MB", highlight=False, soft_wrap=True)
    if settings.database is not None:
        console.print("the database of ONEBASE_DATABASE is not in it: dump it by its own tools, such as pg_dump")


def restore(
    source: Annotated[Path, typer.Argument(help="What `onebase backup` wrote.")],
    home: HomeOption = None,
) -> None:
    """Unpack a backup into a home folder that is empty or not there yet."""
    folder = Home((home or default_home(os.environ)).expanduser().absolute())
    names = restore_home(source, folder)
    console.print(escape(f"restored {', '.join(names)} to {folder.root}"), highlight=False, soft_wrap=True)
    if HOME_ID in names:
        words = (
            f"For ONEBASE_DATABASE it is the folder that was backed up: never run servers on both. If it is to have a "
            f"database of its own, remove {folder.root / HOME_ID}"
        )
        console.print(escape(words), highlight=False, soft_wrap=True)
