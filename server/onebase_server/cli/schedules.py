"""`onebase schedules`: retrainings that order themselves. The running server sees each change within a second."""

import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Column, Table

from onebase.errors import NotFound
from onebase_server.api.admin_schedules import request_of, timing_of
from onebase_server.api.decode import decode_body
from onebase_server.api.schemas_schedules import CreateSchedule
from onebase_server.cli.options import HomeOption, named_by_option
from onebase_server.cli.records import on_database
from onebase_server.jobs.schedules import schedule_row
from onebase_server.records.schedules import ScheduleRecords
from onebase_server.records.tables import LOCAL_OWNER

console = Console()
app = typer.Typer(help="Retraining by the clock: list, add, remove.", no_args_is_help=True)
T = TypeVar("T")
OPTIONS = {"cron": "--cron", "every": "--every", "timezone": "--timezone", "adapter": "ADAPTER", "retrain": "--dataset"}
"""The API's field -> its option."""


@app.command("ls")
def list_all(home: HomeOption = None) -> None:
    """List all schedules."""
    rows = run(home, None, lambda records: records.list())
    if not rows:
        console.print("no schedule yet: `onebase schedules add NAME --cron '0 3 * * *' --stored-chats` makes one")
        return
    key, when = Column("id", no_wrap=True), Column("when", no_wrap=True)
    table = Table(key, "adapter", when, "from", "next", "last run", "note")
    for row in rows:
        timing = f"every {row.every}" if row.every else f"{row.cron} {row.timezone}"
        source = row.request.get("dataset") or row.request.get("training_file") or "stored chats"
        table.add_row(row.id, row.adapter, timing, source, stamp(row.next_at), row.last_run or "-", row.note or "-")
    console.print(table)


@app.command("add")
def add(
    adapter: Annotated[str, typer.Argument(help="The adapter's name.")],
    cron: Annotated[str | None, typer.Option(help="Five fields: '0 3 * * *' is each night at three.")] = None,
    every: Annotated[str | None, typer.Option(help="Instead of --cron: 30m, 6h, 1d or 2w.")] = None,
    timezone: Annotated[str, typer.Option(help="Of --cron, such as Europe/Berlin.")] = "UTC",
    dataset: Annotated[str | None, typer.Option(help="A file or folder in the server's dataset folders.")] = None,
    stored_chats: Annotated[bool, typer.Option("--stored-chats", help="Chats that were marked good.")] = False,
    from_current: Annotated[bool, typer.Option("--from-current", help="Go on from the served version.")] = False,
    gate: Annotated[bool, typer.Option("--gate", help="Publish only what is no worse.")] = False,
    home: HomeOption = None,
) -> None:
    """Retrain an adapter again and again."""
    retrain: dict[str, Any] = {"from": "current" if from_current else "scratch", "gate": gate}
    retrain |= {"dataset": dataset, "stored_chats": stored_chats or None}
    body = {"adapter": adapter, "cron": cron, "every": every, "timezone": timezone, "retrain": retrain}
    with named_by_option(OPTIONS):
        data = decode_body(CreateSchedule, json.dumps(body).encode())
    if (dataset is None) == (not stored_chats):
        raise typer.BadParameter("give either --dataset or --stored-chats")
    with named_by_option(OPTIONS):
        row = schedule_row(adapter, timing_of(data), request_of(data), LOCAL_OWNER, int(time.time()))
    line = f"{row.id}: '{adapter}', first at {stamp(row.next_at)}"
    run(home, f"schedules add {row.id}", lambda records: records.add(row))
    console.print(line, highlight=False)


@app.command("rm")
def remove(
    schedule_id: Annotated[str, typer.Argument(help="Its id, as `onebase schedules ls` shows it.")],
    home: HomeOption = None,
) -> None:
    """Order no more; a run that is going goes on."""
    if not run(home, f"schedules rm {schedule_id}", lambda records: records.remove(schedule_id)):
        raise NotFound(f"no schedule '{schedule_id}': `onebase schedules ls` lists them", param="schedule_id")
    console.print(f"removed {schedule_id}", highlight=False)


def run(home: Path | None, action: str | None, work: Callable[[ScheduleRecords], Awaitable[T]]) -> T:
    return on_database(home, action, lambda database: work(ScheduleRecords(database)))


def stamp(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
