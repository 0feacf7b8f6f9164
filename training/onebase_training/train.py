"""One training run, top to bottom: recipe -> data -> base -> adapter -> Trainer -> checked version in the store.

Each stage is a function of the one before. Nothing reaches the store but by `publish`; whatever ends a run earlier
(a broken file, a NaN, Ctrl-C, kill -9) leaves the store as it was.
"""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from onebase.base_model import LoadedBase, load_base, memory_bytes
from onebase.errors import OnebaseError
from onebase.home import Home
from onebase.store import AdapterStore, Version
from onebase.tokenizer import TextTokenizer
from onebase_training import checkpoint, lora
from onebase_training.assemble import find_base, prepare, read_data, tokens_at_once, training_arguments
from onebase_training.config import Recipe
from onebase_training.dataset import Dataset
from onebase_training.objective import Objective
from onebase_training.plan import Plan, make_plan
from onebase_training.progress import RunCallback, StopRequest
from onebase_training.publish import publish_adapter, write_checked
from onebase_training.status import StatusWriter
from onebase_training.trainer import PlanTrainer, StepDataset, eval_batches, held_out_metrics


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended. `folder` keeps PEFT's files of the adapter, published or not."""

    state: Literal["succeeded", "cancelled"]
    version: Version | None
    folder: Path
    metrics: dict[str, float | int | str | None]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What is no part of a recipe, since it changes no weight."""

    resume: bool = False
    """Go on from the run folder's last checkpoint, if there is one."""
    make_current: bool = True
    aliases: tuple[str, ...] = ()
    """Further names of the version, such as a job's `ft:...`."""


def run(
    recipe: Recipe,
    home: Home,
    *,
    run_dir: Path | None = None,
    status: StatusWriter | None = None,
    console: Console | None = None,
    options: RunOptions | None = None,
) -> RunResult:
    """Carry out a recipe. Raises the OnebaseError that ended it; the status file says the same either way."""
    status, console = status or StatusWriter(None), console or Console()
    run_dir = run_dir or home.create().runs / recipe.name
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        result = _run(recipe, home, run_dir, status, console, options or RunOptions())
    except OnebaseError as error:
        status.enter("failed", error.message, error=_error(error))
        raise
    except KeyboardInterrupt:
        status.enter("cancelled", "interrupted")
        raise
    except BaseException as error:
        status.enter("failed", f"{type(error).__name__}: {error}", error=_error(error))
        raise
    return result


def _run(
    recipe: Recipe,
    home: Home,
    run_dir: Path,
    status: StatusWriter,
    console: Console,
    options: RunOptions,
) -> RunResult:
    started = time.monotonic()
    for notice in recipe.notices:
        console.print(f"[yellow]note[/]: {notice}")
    spec = find_base(home, recipe.base)
    tokenizer = TextTokenizer.load(spec.path)
    dataset = read_data(recipe, spec, tokenizer)
    for notice in dataset.notices:
        console.print(f"[yellow]data[/]: {notice}")
        status.event("notice", {"message": notice})
    plan = make_plan([weight for _, weight in dataset.train], recipe.train)
    status.enter("validating", "loading the base", total_steps=len(plan))
    device = lora.compute_settings(recipe.compute)
    torch.manual_seed(recipe.train.seed)
    base = load_base(spec, device, compute_dtype=recipe.compute.dtype, tokenizer=tokenizer)
    objective = prepare(base, recipe)
    if recipe.resume_from is not None:
        start = AdapterStore(home.adapters).resolve(recipe.resume_from)
        console.print(f"going on from the weights of {start.id}")
        checkpoint.load_adapter_tensors(objective.model, start.path)
    _describe(console, recipe, base, dataset, plan, objective)

    stop = StopRequest()
    trainer, callback, best = _trainer(recipe, objective, base, dataset, plan, run_dir, status, console, stop)
    before = _evaluate_base(trainer, recipe, console)
    last = checkpoint.last_checkpoint(run_dir) if options.resume else None
    if last is not None:
        console.print(f"going on from {last}")
    with stop.installed(console):
        try:
            outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            callback.close()
    if stop.asked:
        return _cancelled(run_dir, status, console, stop)

    metrics = _metrics(trainer, callback, before, outcome, time.monotonic() - started)
    folder = run_dir / "adapter"
    tensors = best.tensors if best.tensors is not None else checkpoint.adapter_tensors(objective.model)
    write_checked(objective.model, tensors, folder)
    version = publish_adapter(
        AdapterStore(home.adapters),
        folder,
        recipe,
        spec,
        metrics,
        make_current=options.make_current,
        aliases=options.aliases,
    )
    _report(console, version, folder, metrics)
    status.enter("succeeded", "published" if version else "trained", version=version.id if version else None)
    return RunResult("succeeded", version, folder, metrics)


class _Best:
    """The adapter of the evaluation with the lowest loss, kept in memory; only with early stopping."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] | None = None


def _trainer(
    recipe: Recipe,
    objective: Objective,
    base: LoadedBase,
    dataset: Dataset,
    plan: Plan,
    run_dir: Path,
    status: StatusWriter,
    console: Console,
    stop: StopRequest,
) -> tuple[PlanTrainer, RunCallback, _Best]:
    rows = [row for row, _ in dataset.train]
    tokens = tokens_at_once(recipe, base, dataset.max_tokens)
    args = training_arguments(recipe, run_dir, len(plan), base.device)
    best = _Best()

    def keep_best(_loss: float) -> None:
        if recipe.train.early_stopping is not None:
            own = checkpoint.adapter_tensors(objective.model)
            best.tensors = {key: value.detach().cpu().clone() for key, value in own.items()}

    callback = RunCallback(plan, recipe.train, status, console, stop, has_eval=bool(dataset.eval), on_best=keep_best)
    trainer = PlanTrainer(
        objective,
        args,
        StepDataset(
            rows,
            plan,
            recipe.train,
            tokens_at_once=tokens,
            pad_id=base.tokenizer.pad_id,
            rank=args.process_index,
            world=args.world_size,
        ),
        eval_batches=eval_batches(dataset.eval, tokens_at_once=tokens, pad_id=base.tokenizer.pad_id),
        keep_checkpoints=recipe.train.keep_checkpoints,
        recipe_hash=_run_hash(recipe, rows),
        callbacks=[callback],
    )
    callback.trainer = trainer
    return trainer, callback, best


def _run_hash(recipe: Recipe, rows: list[Any]) -> str:
    """What a checkpoint depends on: the settings and every row."""
    digest = hashlib.sha256(recipe.settings_hash().encode())
    for row in rows:
        digest.update(row.key)
    return digest.hexdigest()


def _evaluate_base(trainer: PlanTrainer, recipe: Recipe, console: Console) -> dict[str, float]:
    """The untrained adapter is the base: its held-out loss is what training is measured against."""
    if not trainer.eval_batches or recipe.train.eval_every == "never":
        return {}
    metrics = held_out_metrics(trainer.model, trainer.eval_batches, trainer.args.device, "base_")
    console.print(
        f"base: held-out response loss {metrics['base_loss']:.4f}, token accuracy {metrics['base_accuracy']:.1%}"
    )
    return metrics


def _cancelled(run_dir: Path, status: StatusWriter, console: Console, stop: StopRequest) -> RunResult:
    last = checkpoint.last_checkpoint(run_dir) if stop.save else None
    if last is not None:
        console.print(f"stopped; saved {last}. Go on with the same command and --resume")
    status.enter("cancelled", "stopped by a signal; nothing published", checkpoint=str(last) if last else None)
    return RunResult("cancelled", None, run_dir, {})


def _metrics(
    trainer: PlanTrainer, callback: RunCallback, before: dict[str, float], outcome: Any, seconds: float
) -> dict[str, float | int | str | None]:
    """What the version's manifest tells. A loss that is not finite never comes this far."""
    training_seconds = float(outcome.metrics["train_runtime"])
    metrics: dict[str, float | int | str | None] = {
        "train_loss": callback.losses[-1]["train_loss"] if callback.losses else None,
        "steps": int(outcome.global_step),
        "trained_tokens": trainer.trained_tokens,
        "tokens_per_s": round(trainer.trained_tokens / max(1e-6, training_seconds), 1),
        "seconds": round(seconds, 1),
    }
    if callback.evaluations:
        chosen = (
            min(callback.evaluations, key=lambda e: e["loss"]) if callback.stops_early else callback.evaluations[-1]
        )
        metrics |= {"eval_loss": chosen["loss"], "eval_accuracy": chosen["accuracy"], "eval_step": int(chosen["step"])}
    return metrics | before


def _describe(
    console: Console, recipe: Recipe, base: LoadedBase, dataset: Dataset, plan: Plan, objective: Objective
) -> None:
    trainable = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    total = sum(out * into for out, into in base.spec.linear_shapes.values())
    tokens = sum(len(row) for row, _ in dataset.train)
    console.print(
        f"[bold]{recipe.name}[/] on {base.spec.id} ({base.device}, {memory_bytes(base.model) / 1e6:,.0f} MB): "
        f"{len(dataset.train)} conversations, {tokens:,} tokens, {len(dataset.eval)} held out; "
        f"{len(plan)} steps, {plan.epochs:g} epochs; {trainable:,} LoRA parameters "
        f"({trainable / total:.2%} of the linear layers')"
    )


def _report(console: Console, version: Version | None, folder: Path, metrics: dict[str, Any]) -> None:
    where = f"published {version.id}" if version else f"trained, but not servable (DoRA): {folder}"
    console.print(
        f"[green]{where}[/]: {metrics['steps']} steps in {metrics['seconds']} s, {metrics['tokens_per_s']:,} tok/s"
    )


def _error(error: BaseException) -> dict[str, str | None]:
    if isinstance(error, OnebaseError):
        return {"code": error.code or "training_failed", "message": error.message, "param": error.param}
    return {"code": "internal_error", "message": f"{type(error).__name__}: {error}", "param": None}
