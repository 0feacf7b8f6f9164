"""One training run, top to bottom: recipe -> data -> base -> adapter -> Trainer -> checked version in the store.

Each stage is a function of the one before. Nothing reaches the store but by `publish`; whatever ends a run earlier
(a broken file, a NaN, Ctrl-C, kill -9) leaves the store as it was.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from onebase.base_fetch import find_base
from onebase.errors import OnebaseError
from onebase.home import Home
from onebase.store import AdapterStore, Version
from onebase.tokenizer import TextTokenizer
from onebase_training import checkpoint, limits, lora, preflight
from onebase_training.alive import while_working
from onebase_training.assemble import (
    build_trainer,
    has_tensorboard,
    optimizer_name,
    prepare,
    read_data,
)
from onebase_training.beside import Beside
from onebase_training.config import Recipe
from onebase_training.dataset import Dataset
from onebase_training.held_out import held_out_metrics
from onebase_training.plan import make_plan
from onebase_training.progress import RunCallback
from onebase_training.publish import publish_adapter, write_checked
from onebase_training.report import Metrics, describe, final_metrics, write_reports
from onebase_training.rows import make_renderer
from onebase_training.smoke import check_speaks
from onebase_training.status import StatusWriter, error_content
from onebase_training.stop import ServerGone, StopRequest
from onebase_training.trainer import PlanTrainer


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What is no part of a recipe, since it changes no weight."""

    resume: bool = False
    """Go on from the run folder's last checkpoint, if there is one."""
    make_current: bool = True
    aliases: tuple[str, ...] = ()
    """Further names of the version, such as a job's `ft:...`."""
    policy: str = "serve-first"
    """How it makes way for servers on the same home."""
    resume_command: str = ""
    """What a stopped run tells to go on with; empty: the same command and --resume."""
    local_rank: int | None = None
    """This process's number on its machine, when several train together."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run's surroundings. `run_dir` keeps checkpoints, curves and PEFT's files of the adapter."""

    recipe: Recipe
    home: Home
    run_dir: Path
    status: StatusWriter = field(default_factory=lambda: StatusWriter(None))
    console: Console = field(default_factory=Console)
    options: RunOptions = field(default_factory=RunOptions)
    stop: StopRequest = field(default_factory=StopRequest)


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended. `version` is None when it was cancelled, can't be served (DoRA), or on other processes than
    the first of several."""

    state: Literal["succeeded", "cancelled"]
    version: Version | None
    metrics: Metrics


def carry_out(run: Run) -> RunResult:
    """The whole run. Raises the OnebaseError that ended it; the status file says the same either way.

    Raises ServerGone, leaving the status file's state as it was, when the run is to be started again.
    """
    run.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with run.stop.installed(run.console), limits.told(run.recipe, run.run_dir):
            return _carry_out(run)
    except OnebaseError as error:
        run.status.enter("failed", error.message, error=error_content(error))
        raise
    except ServerGone as error:
        run.status.progress(message=str(error))
        raise
    except KeyboardInterrupt:
        return _cancelled(run, "stopped at once" if run.stop.asked else "stopped")
    except BaseException as error:
        run.status.enter("failed", f"{type(error).__name__}: {error}", error=error_content(error))
        raise


def _carry_out(run: Run) -> RunResult:
    started = time.monotonic()
    recipe, console = run.recipe, run.console
    _say(run, "note", recipe.notices)
    if recipe.lora.use_dora:
        _say(run, "note", [lora.MERGE_IT])
    if recipe.train.tensorboard and not has_tensorboard():
        _say(run, "note", ["no curves for tensorboard: pip install tensorboardX"])
    spec = find_base(run.home, recipe.base)
    tokenizer = TextTokenizer.load(spec.path)
    with console.status("reading the data") as line:  # a sign of life for whoever watches the run, too
        dataset = read_data(recipe, spec, tokenizer, lambda text: _told(run, line, text))
    _say(run, "data", dataset.notices)
    plan = make_plan([weight for _, weight in dataset.train], recipe.train)
    run.status.enter("validating", "loading the base", total_steps=len(plan))

    device = lora.compute_settings(recipe.compute, run.options.local_rank)
    optimizer_name(recipe, device)
    torch.manual_seed(recipe.train.seed)
    dtype = lora.compute_dtype(recipe.compute.dtype, device)
    beside = _beside(run, device)
    with while_working(run.status.alive):
        base = beside.load_base(spec, tokenizer, dtype, may_share=not recipe.lora.use_dora)
        objective = prepare(base, recipe)
    objective.between = beside.between
    beside.watch(base.model)
    if recipe.resume_from is not None:
        start = AdapterStore(run.home.adapters).resolve(recipe.resume_from)
        console.print(f"starting from the weights of {start.id}")
        checkpoint.load_adapter_tensors(objective.model, start.path)
    describe(console, recipe, base, dataset, plan, objective)

    callback = RunCallback(
        plan, recipe.train, run.status, console, run.stop, has_eval=bool(dataset.eval), guard=beside.guard
    )
    trainer = build_trainer(recipe, objective, base, dataset, plan, run.run_dir, callback)
    preflight.check(trainer, recipe, console)
    before = _measure_base(run, trainer)
    outcome = _train(run, trainer, callback)
    if run.stop.asked or trainer.stops:
        return _cancelled(run, "stopped")
    if not trainer.is_world_process_zero():
        return RunResult("succeeded", None, {})

    beside.guard()
    metrics = final_metrics(trainer, callback, before, outcome, time.monotonic() - started)
    if beside.waited_s >= 0.05:
        metrics["waited_s"] = round(beside.waited_s, 1)
    with while_working(run.status.alive):
        version = _publish(run, trainer, callback, metrics, dataset)
        write_reports(run.run_dir, recipe, spec, trainer.state.log_history, metrics, version)
    where = f"published {version.id}" if version else f"trained: {run.run_dir / 'adapter'}. {lora.MERGE_IT}"
    console.print(
        f"[green]{where}[/]: {metrics['steps']} steps, {metrics['seconds']} s, {metrics['tokens_per_s']} tok/s"
    )
    run.status.enter("succeeded", "published" if version else "trained", version=version.id if version else None)
    return RunResult("succeeded", version, metrics)


def _beside(run: Run, device: torch.device) -> Beside:
    return Beside(
        run.home.serving,
        run.options.policy,
        device,
        sign_of_life=lambda message: run.status.progress(**({"message": message} if message else {})),
        hurries=lambda: run.stop.asked,
    )


def _measure_base(run: Run, trainer: PlanTrainer) -> dict[str, float]:
    """The untrained adapter is the base: its held-out loss is what training is measured against."""
    starts_as_base = run.recipe.resume_from is None and run.recipe.lora.init != "loftq"
    if not trainer.eval_batches or run.recipe.train.eval_every == "never" or not starts_as_base:
        return {}
    metrics = held_out_metrics(trainer.model, trainer.eval_batches, trainer.args.device, "base_")
    run.console.print(
        f"base: held-out response loss {metrics['base_loss']:.4f}, token accuracy {metrics['base_accuracy']:.1%}"
    )
    return metrics


def _train(run: Run, trainer: PlanTrainer, callback: RunCallback) -> Any:
    last = None
    if run.options.resume:
        last = checkpoint.whole_checkpoint(run.run_dir, lambda damaged: _say(run, "warning", [damaged]))
        run.console.print(f"going on from {last}" if last else f"no checkpoint in {run.run_dir}: from the beginning")
    if last is None and trainer.is_world_process_zero():
        checkpoint.clear(run.run_dir)
    trainer.accelerator.wait_for_everyone()
    with run.stop.after_the_step():
        try:
            return trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            callback.close()


def _publish(
    run: Run, trainer: PlanTrainer, callback: RunCallback, metrics: Metrics, dataset: Dataset
) -> Version | None:
    """The last weights, or with early stopping those of the best evaluation; once they have been heard to speak."""
    model = trainer.model.model
    best = checkpoint.best_adapter(run.run_dir) if callback.stops_early else None
    if best is not None:
        checkpoint.load_adapter_tensors(model, best)
    folder = run.run_dir / "adapter"
    write_checked(model, checkpoint.adapter_tensors(model), folder)
    spec = find_base(run.home, run.recipe.base)
    renderer = make_renderer(run.recipe, spec, TextTokenizer.load(spec.path))
    check_speaks(model, [row for row, _ in dataset.train], renderer.stop_token_ids())
    return publish_adapter(
        AdapterStore(run.home.adapters),
        folder,
        run.recipe,
        spec,
        metrics,
        make_current=run.options.make_current,
        aliases=run.options.aliases,
    )


def _cancelled(run: Run, what: str) -> RunResult:
    """Say what there is to go on from: this run's last checkpoint, if it came so far."""
    own = run.stop.reached_training or run.options.resume
    last = checkpoint.last_checkpoint(run.run_dir) if own else None
    command = run.options.resume_command or "the same command and --resume"
    way = f"saved {last}. Go on with: {command}" if last else "nothing saved"
    run.console.print(f"{what}; nothing published; {way}", highlight=False, soft_wrap=True)
    run.status.enter("cancelled", f"{what}; nothing published", checkpoint=str(last) if last else None)
    return RunResult("cancelled", None, {})


def _told(run: Run, line: Status, text: str) -> None:
    line.update(escape(text))
    run.status.progress(message=text)


def _say(run: Run, kind: str, notices: Any) -> None:
    for notice in notices:
        run.console.print(f"[yellow]{kind}[/]: {escape(notice)}")
        run.status.event("notice", {"message": notice})
