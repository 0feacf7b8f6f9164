"""`python -m onebase_training RECIPE.yaml`: the command line of training. `onebase train|eval|export|data` end here.

Exit codes: 0 done, 1 a user's error (said in one line), 2 wrong usage, 3 a check of `eval` failed, 75 to be started
again (the server whose base it used has ended), 130 stopped by a signal. The environment is read here and in
command_parts.py only; torch is imported once it is needed.
"""

import gc
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from onebase.store import AdapterStore
from onebase_training.command_eval import evaluate
from onebase_training.command_parts import (
    CANCELLED,
    HomeOption,
    PolicyOption,
    UserErrors,
    home_at,
    one_of,
    quiet_libraries,
)


class _DefaultsToTrain(typer.core.TyperGroup):
    """`onebase_training RECIPE.yaml` is `onebase_training train RECIPE.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["train", *args]
        ctx.obj = tuple(args)  # as they were given: a stopped run tells them again
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultsToTrain, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)

data_app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Training files.")
app.add_typer(data_app, name="data")


@app.command()
def train(
    context: typer.Context,
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Train an adapter and publish it as the next version of its name. Ctrl-C once saves a checkpoint."""
    # Under `accelerate launch` every process trains, and the first one speaks.
    speaks = os.environ.get("RANK", "0") == "0"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    console = Console(stderr=True, quiet=quiet or not speaks)
    quiet_libraries()
    from onebase_training.config import load_recipe
    from onebase_training.status import StatusWriter

    writer = StatusWriter(status if speaks else None)
    with UserErrors(Console(stderr=True, quiet=not speaks), writer):
        loaded = load_recipe(recipe)
        console.print(f"{loaded.name} on {loaded.base}: starting", highlight=False)
        from onebase_training.train import Run, RunOptions, carry_out

        place = home_at(home).create()
        result = carry_out(
            Run(
                loaded,
                place,
                run_dir or place.runs / loaded.name,
                writer,
                console,
                RunOptions(
                    resume,
                    make_current,
                    tuple(alias or ()),
                    policy,
                    "" if several else _again(context.find_root().obj),
                    int(os.environ.get("LOCAL_RANK", "0")) if several else None,
                ),
            )
        )
    if result.state == "cancelled":
        raise typer.Exit(CANCELLED)


def _again(arguments: Sequence[str]) -> str:
    """The command line that goes on with a stopped run."""
    return shlex.join(["onebase", *(word for word in arguments if word != "--resume"), "--resume"])


app.command("eval")(evaluate)
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
    push: Annotated[str | None, typer.Option(help="Upload it to the hub, too, as owner/name.")] = None,
    private: Annotated[bool, typer.Option(help="push: make the repository private, if it is new.")] = True,
) -> None:
    """Write a version as a PEFT folder, merged into its base, or as GGUF (LoRA or merged) for llama.cpp.

    `onebase adapters export` is the same command.
    """
    console = Console(stderr=True)
    quiet_libraries()
    one_of("--form", form, ("peft", "merged", "gguf-lora", "gguf-merged"))
    one_of("--gguf-type", gguf_type, ("f16", "bf16", "q8_0"))
    one_of("--onto", onto, ("base", "nf4"))
    one_of("--dtype", dtype, ("bfloat16", "float32"))
    with UserErrors(console):
        from onebase_training import hub

        place = home_at(home)
        if push is not None:
            hub.require_login(push)
        with console.status(f"writing {dest}"):
            if form == "peft":  # without torch, which takes longer to import than the files to copy
                written = AdapterStore(place.adapters).export(model, dest)
            else:
                import torch

                from onebase_training import export as exporting

                written = exporting.export(
                    model,
                    dest,
                    place,
                    form=form,  # type: ignore[arg-type]
                    onto=onto,  # type: ignore[arg-type]
                    dtype=getattr(torch, dtype),
                    gguf_type=gguf_type,  # type: ignore[arg-type]
                    check=check,
                    console=console,
                )
        Console().print(f"wrote {written}", highlight=False, soft_wrap=True)
        if push is not None:
            with console.status(f"pushing to {push}"):
                address = hub.push(written, push, private=private)
            Console().print(address, highlight=False, soft_wrap=True)


@data_app.command("check")
def data_check(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON, text, CSV, Parquet, or a hub dataset owner/name.")],
    home: HomeOption = None,
    base: Annotated[str | None, typer.Option(help="Count tokens with this base's tokenizer.")] = None,
    format: Annotated[str, typer.Option(help="auto, sharegpt, openai, alpaca, orca, completion or text.")] = "auto",
    prompt_format: Annotated[
        str, typer.Option(help="human_response, or chat_template: the base's own.")
    ] = "human_response",
    unknown_role: Annotated[str, typer.Option(help="error, or keep: under a header of its own.")] = "error",
    max_tokens: Annotated[int, typer.Option(help="Rows longer than this are told.")] = 2048,
    show: Annotated[int, typer.Option(help="Print so many rows as coloured tokens: green is learnt.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Say what a training file holds: counts, broken lines, duplicates, lengths, and what will be learnt."""
    console = Console(stderr=True)
    quiet_libraries()
    from onebase_training import config, inspect_data

    with UserErrors(console):
        source = {"path": str(file.resolve() if file.exists() else file), "format": format}
        data = {"train": [source], "max_tokens": max_tokens}
        data |= {"prompt_format": prompt_format, "unknown_role": unknown_role}
        content: dict[str, Any] = {"name": "checked", "data": data}
        recipe = config.make_recipe(content | ({"base": base} if base else {}))
        tokenizer, encoder, limit = inspect_data.tools(recipe, home_at(home).create())
        with console.status("reading") as line:
            report = inspect_data.check_file(recipe, encoder, limit, show, lambda text: line.update(escape(text)))
        if as_json:
            Console().print_json(data=report.as_json())
        else:
            inspect_data.show(report, Console(), tokenizer)
    if not report.ok:
        raise typer.Exit(1)


UsageError: type[Any] = typer.BadParameter.__bases__[0]
"""click's, which typer has a copy of since 0.2x and does not name."""


def main() -> None:
    """Run the command. Wrong usage is one line and exit code 2, as everywhere in `onebase`."""
    try:
        sys.exit(app(prog_name="onebase", standalone_mode=False))
    except UsageError as error:
        words = " ".join(error.format_message().split())
        if words:  # else a group without a command: its help has been shown
            words += f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
            Console(stderr=True).print(f"[red]error[/]: {escape(words)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
    except typer.Abort:
        sys.exit(CANCELLED)
    finally:
        # All files are closed. A last collection over torch's million objects would keep the user waiting for seconds.
        gc.freeze()


if __name__ == "__main__":
    main()
