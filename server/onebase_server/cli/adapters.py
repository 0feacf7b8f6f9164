"""`onebase adapters`: the adapter store from the terminal. A running server sees each change at once."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from onebase.bases import EMBEDDED_ID, resolve_base
from onebase.errors import BaseModelError, ModelNotFound
from onebase.prompt_types import PromptFormat
from onebase.store import AdapterStore
from onebase.store_read import Entry, Version
from onebase_server.cli.options import HANDED_OVER, HomeOption, hand_over, open_home

console = Console()
app = typer.Typer(help="Adapters: list, show, remove, roll back, import, export.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="`name`, `name@3`, or a job's `ft:...` name.")]


def open_store(home: Path | None) -> AdapterStore:
    return AdapterStore(open_home(home).adapters)


@app.command("ls")
def list_all(home: HomeOption = None) -> None:
    """List adapters, their versions and what is served."""
    entries = open_store(home).list()
    if not entries:
        console.print("no adapter yet: `onebase train RECIPE.yaml` makes one")
        return
    table = Table("adapter", "serves", "versions", "base", "response loss", "created")
    for entry in entries:
        table.add_row(*row(entry))
    console.print(table)


def row(entry: Entry) -> tuple[str, ...]:
    shown = entry.current or entry.versions[-1]
    shares = ", ".join(
        f"@{version}" if share == 1 else f"@{version} {share:.0%}" for version, share in entry.weights.items()
    )
    loss = shown.metrics.get("eval_loss")
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(shown.created_at))
    numbers = " ".join(str(version.version) for version in entry.versions)
    return entry.name, shares or "nothing", numbers, shown.manifest.base.id, str(loss or "-"), created


@app.command("show")
def show(model: Model, home: HomeOption = None) -> None:
    """Print a version's manifest."""
    version = open_store(home).resolve(model)
    console.print_json(json.dumps(describe(version)))


def describe(version: Version) -> dict[str, object]:
    manifest = version.manifest.model_dump()
    return {"id": version.id, "path": str(version.path), "digest": version.digest, **manifest}


@app.command("rm")
def remove(
    model: Annotated[str, typer.Argument(help="`name@3`, or `name` for all its versions.")],
    force: Annotated[bool, typer.Option(help="Also a version that is being served.")] = False,
    home: HomeOption = None,
) -> None:
    """Remove a version, or an adapter whole. Running requests on it finish."""
    open_store(home).remove(model, force=force)
    console.print(f"removed {model}", highlight=False)


@app.command("rollback")
def rollback(
    name: Annotated[str, typer.Argument(help="The adapter's name.")],
    to: Annotated[int | None, typer.Option(help="A version's number. Default: what was served before.")] = None,
    home: HomeOption = None,
) -> None:
    """Serve an earlier version again."""
    entry = open_store(home).rollback(name, to)
    console.print(f"{name} serves {', '.join(f'@{v}' for v in entry.weights)}", highlight=False)


@app.command("import")
def import_folder(
    path: Annotated[Path, typer.Argument(help="A PEFT LoRA folder.")],
    name: Annotated[str, typer.Argument(help="The name that clients will use as `model`.")],
    base: Annotated[str, typer.Option(help="The base that it was trained on, by id or path.")] = EMBEDDED_ID,
    prompt_format: Annotated[str | None, typer.Option(help="human_response or chat_template.")] = None,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="It was trained on this base, whatever name its config says.")
    ] = False,
    home: HomeOption = None,
) -> None:
    """Check a PEFT LoRA folder against the base and publish it as the name's next version."""
    folder = open_home(home)
    try:
        spec = resolve_base(folder, base)
    except ModelNotFound as error:
        raise BaseModelError(f"no base {base!r} here; get it first: onebase base fetch {base}", param="base") from error
    version = AdapterStore(folder.adapters).import_folder(
        path,
        name,
        base=spec.identity,
        prompt_format=known_format(prompt_format),
        base_shapes=spec.linear_shapes,
        same_base=same_base,
    )
    console.print(f"published {version.id}", highlight=False)


def known_format(text: str | None) -> PromptFormat | None:
    match text:
        case None | "human_response" | "chat_template":
            return text
    raise typer.BadParameter("must be human_response or chat_template", param_hint="--prompt-format")


@app.command("export", context_settings=HANDED_OVER)
def export(context: typer.Context) -> None:
    """Write a version as a PEFT folder, merged into its base, or as GGUF; or push it (`--help` for all)."""
    hand_over("export", context.args)
