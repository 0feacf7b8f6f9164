"""What the commands of `python -m onebase_training` share: options, what errors become, quiet libraries."""

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from onebase.errors import DatasetError, OnebaseError
from onebase.home import Home, default_home
from onebase.serving_note import RESUME_EXIT
from onebase.train_policy import policy_of
from onebase_training.stop import ServerGone

CANCELLED = 130
CHECK_FAILED = 3


def _policy(given: str) -> str:
    try:
        policy_of(given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return given


PolicyOption = Annotated[
    str,
    typer.Option(
        "--train-policy",
        envvar="ONEBASE_TRAIN_POLICY",
        callback=_policy,
        help="How it makes way for a server on this home: serve-first, fair, train-first, or a share as 0.7.",
    ),
]

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="Home folder. Default: $ONEBASE_HOME, else ~/.onebase", metavar="DIR")
]


def home_at(given: Path | None) -> Home:
    """The folder of --home, or the environment's."""
    return Home(given or default_home(os.environ))


def one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)


class UserErrors:
    """Known errors become one line (or one line a broken record) and exit code 1, not a traceback."""

    def __init__(self, console: Console, status: Any = None) -> None:
        self._console, self._status = console, status

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._console.print("stopped")
            raise typer.Exit(CANCELLED)
        if isinstance(error, ServerGone):
            self._console.print(f"[yellow]stopped[/]: {error}; to be started again with --resume", highlight=False)
            raise typer.Exit(RESUME_EXIT)
        if not isinstance(error, OnebaseError):
            return
        if self._status is not None and self._status.status.state != "failed":
            self._status.enter(
                "failed",
                error.message,
                error={"code": error.code or "invalid_recipe", "message": error.message, "param": error.param},
            )
        lines = [error.message]
        if isinstance(error, DatasetError):
            lines = [*error.problems[:50]]
            if len(error.problems) > 50:
                lines.append(f"and {len(error.problems) - 50} more")
        for line in lines:
            # Escaped: a line may hold what a file says, and brackets are Rich's markup.
            self._console.print(f"[red]error[/]: {escape(line)}", highlight=False)
        raise typer.Exit(1)


def quiet_libraries() -> None:
    """Their bars and hints would tear ours; their warnings stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A thread that waits at a barrier sleeps instead of spinning: training shares its cores with the server.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Micro-batches differ in length: without this, gaps between freed CUDA blocks would take memory of their own.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
