"""The `onebase` command's entry: commands are grouped in the modules beside this one.

Training is another package and another process: `train`, `eval`, `export` and `data` hand their words to
`python -m onebase_training` unchanged, so that neither package imports the other.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from onebase import __version__
from onebase.errors import OnebaseError
from onebase_server.cli import adapters, base, bench, care, chat, keys, schedules, serve
from onebase_server.cli.options import HANDED_OVER, hand_over

app = typer.Typer(
    name="onebase",
    help="One frozen 4-bit base, many QLoRA adapters: train them, serve them, swap them, behind OpenAI's API.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("bench")(bench.bench)
app.add_typer(adapters.app, name="adapters")
app.add_typer(base.app, name="base")
app.add_typer(keys.app, name="keys")
app.add_typer(schedules.app, name="schedules")
app.command("doctor")(care.doctor)
app.command("backup")(care.backup)
app.command("restore")(care.restore)

UsageError: type[Any] = typer.BadParameter.__bases__[0]
"""click's, which typer has a copy of since 0.2x and does not name."""


@app.command("train", context_settings=HANDED_OVER)
def train(context: typer.Context) -> None:
    """Train an adapter from a recipe and publish it: `onebase train RECIPE.yaml` (`--help` for all)."""
    hand_over("train", context.args)


@app.command("eval", context_settings=HANDED_OVER)
def evaluate(context: typer.Context) -> None:
    """Compare base and adapters on a held-out file: loss, accuracy, stop rate, checks."""
    hand_over("eval", context.args)


app.command("export", context_settings=HANDED_OVER)(adapters.export)


@app.command("data", context_settings=HANDED_OVER)
def data(context: typer.Context) -> None:
    """Check a training file: `onebase data check FILE`."""
    hand_over("data", context.args)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        Console().print(f"onebase {__version__}", highlight=False)
        raise typer.Exit


def main() -> None:
    """Run the command. An error that the user can mend is one line, never a traceback: exit code 2 if it is in how the
    command was called (options, settings), else 1."""
    try:
        sys.exit(app(prog_name=Path(sys.argv[0]).name, standalone_mode=False))
    except UsageError as error:
        words = " ".join(error.format_message().split())
        if not words:  # a group without a command: its help has been shown
            sys.exit(2)
        fail(f"{words} (see `{error.ctx.command_path} --help`)" if error.ctx else words, 2)
    except OnebaseError as error:
        fail(error.message, 2 if error.param == "settings" else 1)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 1)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)


def fail(words: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error[/] {escape(words)}", highlight=False, soft_wrap=True)
    sys.exit(code)
