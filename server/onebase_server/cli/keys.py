"""`onebase keys`: make, list and revoke API keys. A running server sees each change within half a second."""

import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from onebase.bases import EMBEDDED_ID, list_bases
from onebase.errors import InvalidInput, NotFound
from onebase.store import AdapterStore
from onebase_server.api.admin_keys import order_of
from onebase_server.api.decode import decode_body
from onebase_server.api.keys import new_key
from onebase_server.api.schemas_keys import CreateKey
from onebase_server.cli.options import HomeOption, named_by_option, open_home
from onebase_server.cli.records import on_database
from onebase_server.records.keys import KeyRecords
from onebase_server.records.tables import KeyRow

console = Console()
app = typer.Typer(help="API keys: make, list, revoke.", no_args_is_help=True)
T = TypeVar("T")
OPTIONS = {
    "name": "--name", "scopes": "--scope", "models": "--models", "owner": "--owner", "rpm": "--rpm", "tpm": "--tpm",
    "parallel": "--parallel", "expires_in": "--expires",
}  # fmt: skip
"""The API's field -> its option."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800, "y": 31_536_000}


@app.command("create")
def create(
    name: Annotated[str, typer.Option(help="Whose it is or what it is for.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="inference, training or admin; may be given again. Default: inference.")
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Names it may call, comma-separated. Default: all that nobody else trained.")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Keys with one owner share files, jobs and adapters.")] = None,
    rpm: Annotated[int | None, typer.Option(min=1, help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, help="Tokens a minute.")] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Sequences at a time: n=3 or three prompts are three.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="Such as 12h, 30d, 1y. Default: never.")] = None,
    home: HomeOption = None,
) -> None:
    """Make a key and show it: this once, since only its hash is kept."""
    given = {
        "name": name,
        "scopes": scope or ["inference"],
        "owner": owner,
        "models": None if models is None else [word.strip() for word in models.split(",") if word.strip()],
        "rpm": rpm,
        "tpm": tpm,
        "parallel": parallel,
        "expires_in": None if expires is None else seconds_of(expires),
    }
    with named_by_option(OPTIONS):
        if given["models"] == []:
            raise InvalidInput("it names no model: leave it out for all", param="models")
        order = order_of(decode_body(CreateKey, json.dumps(given).encode()))
    row, key = new_key(order, int(time.time()))
    key_id = row.id
    run(home, f"keys create {key_id}", lambda records: records.add(row))
    for model in unknown_models(order.models or (), home):
        words = f"'{model}' is no adapter or base here yet: the key may call it once it is there"
        Console(stderr=True).print(f"[yellow]note[/] {escape(words)}", highlight=False, soft_wrap=True)
    console.print(f"{key_id} ({', '.join(order.scopes)}) for {name}; keep it, it is not shown again:", highlight=False)
    console.print(key, highlight=False, soft_wrap=True)


@app.command("ls")
def list_all(home: HomeOption = None) -> None:
    """List all keys that were made here."""
    rows = run(home, None, lambda records: records.list())
    if not rows:
        console.print("no key yet: `onebase keys create --name me --scope admin` makes one")
        return
    whole = [Column(name, no_wrap=True) for name in ("id", "last used")]
    folded = [Column(name, overflow="fold") for name in ("name", "owner", "scopes", "models", "limits", "state")]
    table = Table(whole[0], *folded, whole[1], box=None)
    for row in rows:
        table.add_row(*map(escape, cells(row, time.time())))
    console.print(table)


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="Its id, as `onebase keys ls` shows it.")], home: HomeOption = None
) -> None:
    """Refuse a key from now on. What runs on it finishes; what it made stays."""
    row = run(home, f"keys revoke {key_id}", lambda records: records.revoke(key_id, int(time.time())))
    if row is None:
        raise NotFound(f"no key '{key_id}': `onebase keys ls` lists them", param="key_id")
    console.print(f"revoked {key_id} ({row.name})", highlight=False)


def run(home: Path | None, action: str | None, work: Callable[[KeyRecords], Awaitable[T]]) -> T:
    return on_database(home, action, lambda database: work(KeyRecords(database)))


def unknown_models(models: Iterable[str], home: Path | None) -> list[str]:
    """Those that name neither an adapter nor a base of this home folder."""
    folder = open_home(home)
    known = {entry.name for entry in AdapterStore(folder.adapters).list()}
    known |= {EMBEDDED_ID, *(spec.id for spec in list_bases(folder))}
    return [model for model in models if model not in known]


def seconds_of(text: str) -> int:
    """`90m` -> 5400. Raises BadParameter."""
    match = re.fullmatch(r"([1-9]\d{0,8})([smhdwy])", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"'{text}' is no span of time: write 12h, 30d or 1y", param_hint="'--expires'")
    return int(match[1]) * UNITS[match[2]]


def cells(row: KeyRow, now: float) -> tuple[str, ...]:
    def stamp(seconds: int | None) -> str:
        return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

    state = "good" if row.expires_at is None else f"until {stamp(row.expires_at)}"
    if row.revoked_at is not None:
        state = f"revoked {stamp(row.revoked_at)}"
    elif row.expires_at is not None and row.expires_at <= now:
        state = f"expired {stamp(row.expires_at)}"
    models = "all" if row.models is None else ", ".join(row.models) or "none"
    given = ((row.rpm, "rpm"), (row.tpm, "tpm"), (row.parallel, "at a time"))
    limits = ", ".join(f"{limit:,} {what}" for limit, what in given if limit is not None) or "-"
    owner = "itself" if row.owner == row.id else row.owner
    return row.id, row.name, owner, ", ".join(row.scopes), models, limits, state, stamp(row.last_used_at)
