"""What a run tells at its start and its end: one line, the metrics of the manifest, curves, a model card."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from onebase.base_model import LoadedBase, memory_bytes
from onebase.bases import BaseSpec
from onebase.durable import replace_file
from onebase.store import Version
from onebase_training.config import Recipe
from onebase_training.dataset import Dataset
from onebase_training.objective import Objective
from onebase_training.plan import Plan
from onebase_training.progress import RunCallback
from onebase_training.trainer import PlanTrainer

Metrics = dict[str, float | int | str | None]

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""OpenAI's result file."""


def describe(
    console: Console, recipe: Recipe, base: LoadedBase, dataset: Dataset, plan: Plan, objective: Objective
) -> None:
    trainable = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    total = sum(out * into for out, into in base.spec.linear_shapes.values())
    tokens = sum(len(row) for row, _ in dataset.train)
    shared = " of a server's" if base.is_shared else ""
    console.print(
        f"[bold]{recipe.name}[/] on {base.spec.id} ({base.device}, {memory_bytes(base.model) / 1e6:,.0f} MB{shared}): "
        f"{len(dataset.train)} conversations, {tokens:,} tokens, {len(dataset.eval)} held out; "
        f"{len(plan)} steps, {plan.epochs:g} epochs; {trainable:,} LoRA parameters "
        f"({trainable / total:.2%} of the linear layers')"
    )


def final_metrics(
    trainer: PlanTrainer, callback: RunCallback, before: Mapping[str, float], outcome: Any, seconds: float
) -> Metrics:
    """What the version's manifest tells. A loss that is not finite never comes this far."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    metrics: Metrics = {
        "train_loss": losses[-1] if losses else None,
        "steps": int(outcome.global_step),
        "trained_tokens": trainer.trained_tokens,
        "tokens_per_s": round(trainer.session_tokens / max(1e-6, float(outcome.metrics["train_runtime"])), 1),
        "seconds": round(seconds, 1),
    }
    if evaluations:
        best = min(evaluations, key=lambda entry: float(entry["eval_loss"]))
        chosen = best if callback.stops_early else evaluations[-1]
        metrics |= {"eval_loss": chosen["eval_loss"], "eval_accuracy": chosen["eval_accuracy"]}
        metrics |= {"eval_step": int(chosen["step"]), "eval_tokens": int(chosen["eval_tokens"])}
    return {**metrics, **before}


def write_reports(
    folder: Path,
    recipe: Recipe,
    spec: BaseSpec,
    history: Sequence[Mapping[str, Any]],
    metrics: Metrics,
    version: Version | None,
) -> None:
    """`results.csv`, `loss.png` (with matplotlib) and a model card."""
    replace_file(folder / "results.csv", results_csv(history).encode())
    replace_file(folder / "README.md", model_card(recipe, spec, metrics, version).encode())
    draw_losses(history, folder / "loss.png")


def results_csv(history: Sequence[Mapping[str, Any]]) -> str:
    """OpenAI's columns, a row a step, empty cells where nothing was measured."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        row = rows.setdefault(int(entry["step"]), {"step": int(entry["step"])})
        if "loss" in entry:
            row |= {"train_loss": f"{entry['loss']:.5f}", "train_accuracy": f"{entry['accuracy']:.5f}"}
        if "eval_loss" in entry:
            row |= {
                "valid_loss": f"{entry['eval_loss']:.5f}",
                "valid_mean_token_accuracy": f"{entry['eval_accuracy']:.5f}",
            }
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows) if len(rows[step]) > 1)
    return out.getvalue()


def draw_losses(history: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """The curves as a PNG; False without matplotlib, which is optional."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if name == "eval_loss" else None)
    axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    return True


def model_card(recipe: Recipe, spec: BaseSpec, metrics: Metrics, version: Version | None) -> str:
    """A README in the hub's form."""
    numbers = "\n".join(f"| {name} | {value} |" for name, value in metrics.items())
    targets = recipe.lora.target_modules
    named = targets if isinstance(targets, str) else ", ".join(targets)
    return f"""---
base_model: {spec.id}
library_name: peft
tags: [lora, qlora, onebase]
---

# {version.id if version else recipe.name}

{recipe.description or "A QLoRA adapter."}

A LoRA (r = {recipe.lora.r}, alpha = {recipe.lora.alpha:g}, {named})
on `{spec.id}` at revision `{spec.identity.revision}`, trained on its 4-bit NF4 values with onebase.

Prompt format: `{recipe.data.prompt_format}`. Preset: `{recipe.preset}`. Seed: {recipe.train.seed}.

| measured | |
| --- | --- |
{numbers}
"""
