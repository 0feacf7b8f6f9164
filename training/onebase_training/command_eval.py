"""`onebase eval`: measure versions beside the base, let checks decide, show what was measured before."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from onebase.durable import replace_file
from onebase.home import Home
from onebase_training.command_parts import CHECK_FAILED, HomeOption, PolicyOption, UserErrors, home_at, quiet_libraries


def evaluate(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="A recipe: its held-out rows are used. Or a data file, or a hub dataset owner/name.",
            metavar="RECIPE|FILE",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="name or name@version; may be given again.")
    ] = None,
    home: HomeOption = None,
    split: Annotated[
        str | None, typer.Option(help="Of a hub dataset, or of a folder that datasets saved. Default: train.")
    ] = None,
    base: Annotated[bool, typer.Option(help="Measure the base too.")] = True,
    max_examples: Annotated[int | None, typer.Option(help="So many conversations at most.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest greedy answer, in tokens.")] = 200,
    check: Annotated[
        list[str] | None,
        typer.Option(
            "--check",
            help="Exit with 3 unless the answers pass: NAME=REGEX, a name of the recipe's eval.checks, or exact (the "
            "answer as it stands in the file). May be given again.",
        ),
    ] = None,
    at_least: Annotated[float, typer.Option(min=0, max=1, help="Share of the answers that must pass.")] = 1.0,
    reports: Annotated[
        bool, typer.Option("--reports", help="Measure nothing: show what was measured of --adapter, or of all.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the results as JSON.")] = None,
    status: Annotated[Path | None, typer.Option("--status", help="Say there what is being measured.")] = None,
    policy: PolicyOption = "serve-first",
) -> None:
    """Measure adapters beside the base on held-out conversations: loss, accuracy, stop rate, checks.

    Each version's results are kept under the home folder, and --reports shows them again.
    """
    console = Console(stderr=True)
    quiet_libraries()
    if reports:
        _show_reports(home_at(home), adapter or [], out)
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe or a data file (or --reports)", param_hint="RECIPE|FILE")
    is_recipe = recipe.suffix in (".yaml", ".yml")
    if is_recipe and split is not None:
        raise typer.BadParameter("a recipe names the split itself, in its data.eval", param_hint="--split")
    from onebase_training import eval_checks, eval_reports
    from onebase_training.config import load_recipe, recipe_for_file
    from onebase_training.status import StatusWriter

    with UserErrors(console):
        place = home_at(home).create()
        loaded = load_recipe(recipe) if is_recipe else recipe_for_file(recipe, place, adapter or [], split or "train")
        loaded, deciding = eval_checks.with_checks(loaded, check or [])
        from onebase_training import evaluate as measuring
        from onebase_training import limits

        with limits.told(loaded):
            results = measuring.evaluate(
                loaded,
                place,
                adapter or ([loaded.name] if is_recipe else []),
                with_base=base,
                deciding=deciding,
                max_examples=max_examples,
                max_new_tokens=max_tokens,
                console=console,
                status=StatusWriter.taken_up(status),
                policy=policy,
            )
        judged = results[1:] if base and len(results) > 1 else results  # the base comes first
        failed = eval_checks.failures(judged, deciding, at_least)
        if out is not None:
            eval_reports.write_json(results, out, failed)
        Console().print(eval_reports.as_table(results))
    for failure in failed:
        console.print(f"[red]failed[/]: {failure}", highlight=False, soft_wrap=True)
        for answer in next(each for each in judged if each.model == failure.model).misses.get(failure.check, ()):
            console.print(f"  {answer!r}", highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(CHECK_FAILED)


def _show_reports(home: Home, names: list[str], out: Path | None) -> None:
    from onebase_training import eval_reports

    found = eval_reports.kept(home.evaluations, names)
    if out is not None:
        replace_file(out, (json.dumps(found, indent=1) + "\n").encode())
    for table in eval_reports.kept_tables(found):
        Console().print(table)
    if not found:
        Console(stderr=True).print("nothing has been measured yet: onebase eval RECIPE|FILE -a NAME")
