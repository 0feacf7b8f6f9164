"""`python -m onebase_training RECIPE.yaml`: the command line of training. `onebase train|eval|export|data` end here.

Exit codes: 0 done, 1 a user's error (said in one line), 2 wrong usage, 75 to be started again (the server whose base
it used has ended), 130 stopped by a signal. The environment is read here only; torch is imported once it is needed.
"""

import gc
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from onebase.errors import DatasetError, OnebaseError
from onebase.home import Home, default_home
from onebase.serving_note import RESUME_EXIT
from onebase.train_policy import share_of
from onebase_training.stop import ServerGone

CANCELLED = 130


class _DefaultsToTrain(typer.core.TyperGroup):
    """`onebase_training RECIPE.yaml` is `onebase_training train RECIPE.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["train", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultsToTrain, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)

data_app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Training files.")
app.add_typer(data_app, name="data")


def _policy(given: str) -> str:
    try:
        share_of(given)
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


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="The run's YAML file; see training/recipes.", metavar="RECIPE.yaml")],
    home: HomeOption = None,
    status: Annotated[
        Path | None, typer.Option("--status", help="Keep this JSON file up to date with state and progress.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Checkpoints and curves. Default: HOME/runs/NAME")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")] = False,
    make_current: Annotated[bool, typer.Option(help="Let the adapter's name point to the new version at once.")] = True,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", help="A further name of the version, such as ft:...")
    ] = None,
    policy: PolicyOption = "serve-first",
) -> None:
    """Train an adapter and publish it as the next version of its name. Ctrl-C once saves a checkpoint."""
    # Under `accelerate launch` every process trains, and the first one speaks.
    speaks = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=True, quiet=not speaks)
    _quiet_libraries()
    from onebase_training.config import load_recipe
    from onebase_training.status import StatusWriter

    writer = StatusWriter(status if speaks else None)
    with _UserErrors(console, writer):
        loaded = load_recipe(recipe)
        console.print(f"{loaded.name} on {loaded.base}: starting", highlight=False)
        from onebase_training.train import Run, RunOptions, carry_out

        place = Home(home or default_home(os.environ)).create()
        result = carry_out(
            Run(
                loaded,
                place,
                run_dir or place.runs / loaded.name,
                writer,
                console,
                RunOptions(resume, make_current, tuple(alias or ()), policy),
            )
        )
    if result.state == "cancelled":
        raise typer.Exit(CANCELLED)


@app.command("eval")
def evaluate(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe: its held-out rows are used. Or a data file.", metavar="RECIPE|FILE")
    ],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="name or name@version; may be given again.")
    ] = None,
    home: HomeOption = None,
    base: Annotated[bool, typer.Option(help="Measure the base too.")] = True,
    max_examples: Annotated[int | None, typer.Option(help="So many conversations at most.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest greedy answer, in tokens.")] = 200,
    out: Annotated[Path | None, typer.Option("--out", help="Write the results as JSON.")] = None,
    status: Annotated[Path | None, typer.Option("--status", help="Say there what is being measured.")] = None,
    policy: PolicyOption = "serve-first",
) -> None:
    """Measure adapters beside the base on held-out conversations: loss, accuracy, stop rate, checks."""
    console = Console(stderr=True)
    _quiet_libraries()
    from onebase_training.config import load_recipe, recipe_for_file
    from onebase_training.status import StatusWriter

    with _UserErrors(console):
        place = Home(home or default_home(os.environ)).create()
        is_recipe = recipe.suffix in (".yaml", ".yml")
        loaded = load_recipe(recipe) if is_recipe else recipe_for_file(recipe, place, adapter or [])
        from onebase_training import evaluate as measuring

        results = measuring.evaluate(
            loaded,
            place,
            adapter or ([loaded.name] if is_recipe else []),
            with_base=base,
            max_examples=max_examples,
            max_new_tokens=max_tokens,
            console=console,
            status=StatusWriter.taken_up(status),
            policy=policy,
        )
        if out is not None:
            measuring.write_json(results, out)
        Console().print(measuring.as_table(results))


app.command("evaluate", hidden=True)(evaluate)


@app.command("export")
def export(
    model: Annotated[str, typer.Argument(help="name, name@version, ft:..., or a folder of PEFT's files.")],
    dest: Annotated[Path, typer.Argument(help="A folder (or for GGUF a file) that does not exist yet.")],
    home: HomeOption = None,
    form: Annotated[str, typer.Option(help="peft, merged, gguf-lora or gguf-merged.")] = "peft",
    onto: Annotated[
        str, typer.Option(help="merged: onto the published weights (base) or the values that are served (nf4).")
    ] = "base",
    dtype: Annotated[str, typer.Option(help="merged: bfloat16 or float32.")] = "bfloat16",
    gguf_type: Annotated[str, typer.Option(help="gguf-merged: f16, bf16 or q8_0.")] = "f16",
    check: Annotated[bool, typer.Option(help="merged: compare its logits with the unmerged adapter's.")] = True,
    push: Annotated[str | None, typer.Option(help="Upload it to the hub, too, as owner/name (private).")] = None,
) -> None:
    """Write a version as a PEFT folder, merged into its base, or as GGUF (LoRA or merged) for llama.cpp."""
    console = Console(stderr=True)
    _quiet_libraries()
    _one_of("--form", form, ("peft", "merged", "gguf-lora", "gguf-merged"))
    _one_of("--gguf-type", gguf_type, ("f16", "bf16", "q8_0"))
    _one_of("--onto", onto, ("base", "nf4"))
    _one_of("--dtype", dtype, ("bfloat16", "float32"))
    with _UserErrors(console):
        import torch

        from onebase_training import export as exporting

        written = exporting.export(
            model,
            dest,
            Home(home or default_home(os.environ)),
            form=form,  # type: ignore[arg-type]
            onto=onto,  # type: ignore[arg-type]
            dtype=getattr(torch, dtype),
            gguf_type=gguf_type,  # type: ignore[arg-type]
            check=check,
            console=console,
        )
        Console().print(f"wrote {written}", highlight=False)
        if push is not None:
            Console().print(exporting.push(written, push), highlight=False)


@data_app.command("check")
def data_check(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON or text.")],
    home: HomeOption = None,
    base: Annotated[str | None, typer.Option(help="Count tokens with this base's tokenizer.")] = None,
    format: Annotated[str, typer.Option(help="auto, sharegpt, openai, alpaca, orca, completion or text.")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Rows longer than this are told.")] = 2048,
    show: Annotated[int, typer.Option(help="Print so many rows as coloured tokens: green is learnt.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Say what a training file holds: counts, broken lines, duplicates, lengths, and what will be learnt."""
    console = Console(stderr=True)
    _quiet_libraries()
    from onebase_training import config, inspect_data

    with _UserErrors(console):
        source = {"path": str(file.resolve()), "format": format}
        content: dict[str, Any] = {"name": "checked", "data": {"train": [source], "max_tokens": max_tokens}}
        recipe = config.make_recipe(content | ({"base": base} if base else {}))
        tokenizer, encoder, limit = inspect_data.tools(recipe, Home(home or default_home(os.environ)).create())
        report = inspect_data.check_file(recipe, encoder, limit)
        if as_json:
            Console().print_json(data=report.as_json())
        else:
            inspect_data.show(report, Console(), tokenizer, show)
    if not report.ok:
        raise typer.Exit(1)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)


class _UserErrors:
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
            self._console.print(f"[red]error[/]: {line}", highlight=False)
        raise typer.Exit(1)


def _quiet_libraries() -> None:
    """Their bars and hints would tear ours; their warnings stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A thread that waits at a barrier sleeps instead of spinning: training shares its cores with the server.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Micro-batches differ in length: without this, gaps between freed CUDA blocks would take memory of their own.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main() -> None:
    try:
        app(prog_name="onebase_training")
    finally:
        # All files are closed. A last collection over torch's million objects would keep the user waiting for seconds.
        gc.freeze()


if __name__ == "__main__":
    main()
