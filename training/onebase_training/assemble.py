"""The parts of a run, each made from the recipe: base, rows, model to train, Trainer's arguments. No run logic."""

import difflib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from onebase.base_model import LoadedBase
from onebase.bases import BaseSpec
from onebase.errors import RecipeError
from onebase.tokenizer import TextTokenizer
from onebase_training import attention, lora
from onebase_training.config import Recipe
from onebase_training.dataset import Dataset, load_dataset
from onebase_training.fuse import fuse
from onebase_training.fuse_layers import fuse_layers
from onebase_training.held_out import eval_batches
from onebase_training.loftq import start_from_rounding_error
from onebase_training.objective import Objective
from onebase_training.plan import Plan
from onebase_training.progress import RunCallback
from onebase_training.recompute import Recompute
from onebase_training.rows import Encoder, make_renderer
from onebase_training.same_recipe import made_with
from onebase_training.trainer import PlanTrainer, StepDataset


def read_data(
    recipe: Recipe, spec: BaseSpec, tokenizer: TextTokenizer, told: Callable[[str], None] = lambda _: None
) -> Dataset:
    encoder = Encoder(tokenizer, make_renderer(recipe, spec, tokenizer), headers=recipe.data.headers)
    return load_dataset(recipe, encoder, spec.context_length, told)


def prepare(base: LoadedBase, recipe: Recipe) -> Objective:
    """The base with a fresh adapter, in the fastest form that gives the same numbers."""
    base.model.config._attn_implementation = attention.register()
    checkpointing = recipe.compute.gradient_checkpointing
    checkpointed = lora.checkpoint_activations(base, checkpointing)
    lora.keep_dequantized(base, recipe.compute.keep_dequantized)
    model = lora.attach_adapter(base, recipe.lora)
    if recipe.lora.init == "loftq":
        start_from_rounding_error(model, base)
    fuse(model, base.compute_dtype)
    if base.device.type == "cuda":  # what it saves is the host's time to start kernels: a CPU has none to start
        fuse_layers(model, base.compute_dtype)
    found_by_preflight = checkpointed and checkpointing == "auto"
    return Objective(model, Recompute(base.model, recipe.compute.memory_gb) if found_by_preflight else None)


def optimizer_name(recipe: Recipe, device: torch.device) -> str:
    """Trainer's name of the optimiser. Paging is CUDA's; on CPU the same optimiser runs without it."""
    known = [str(name.value) for name in transformers.training_args.OptimizerNames]
    name = recipe.train.optimizer
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise RecipeError(
            f"train.optimizer: {name!r} is none of Trainer's; did you mean {' or '.join(near or known[:2])}?",
            param="train.optimizer",
        )
    return name.removeprefix("paged_") if device.type == "cpu" else name


def training_arguments(recipe: Recipe, run_dir: Path, steps: int, device: torch.device) -> Any:
    """The recipe in Trainer's words. Evaluation, saving and accumulation are ours (progress.py, trainer.py)."""
    config = recipe.train
    warmup = round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    args = transformers.TrainingArguments(
        output_dir=str(run_dir),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" and warmup else config.schedule,
        warmup_steps=warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=optimizer_name(recipe, device),
        adam_beta2=config.adam_beta2,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device.type == "cpu",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        report_to=["tensorboard"] if config.tensorboard and has_tensorboard() else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        average_tokens_across_devices=False,
    )
    keep_on_one_device(args, device)
    return args


def keep_on_one_device(args: Any, device: torch.device) -> None:
    """A process trains on the device that its base is on. Left alone, Trainer would go to the first GPU, and hand
    copies of the model to every other one that it sees (DataParallel)."""
    if device.type == "cuda" and args.world_size == 1:
        args.__dict__["_setup_devices"] = torch.device("cuda", device.index or 0)  # its cached property
        args._n_gpu = 1
        torch.cuda.set_device(device.index or 0)


def build_trainer(
    recipe: Recipe,
    objective: Objective,
    base: LoadedBase,
    dataset: Dataset,
    plan: Plan,
    run_dir: Path,
    callback: RunCallback,
) -> PlanTrainer:
    rows = [row for row, _ in dataset.train]
    tokens, pad_id = tokens_at_once(recipe, base, dataset.max_tokens), base.tokenizer.pad_id
    args = training_arguments(recipe, run_dir, len(plan), base.device)
    steps = StepDataset(
        rows,
        plan,
        recipe.train,
        tokens_at_once=tokens,
        pad_id=pad_id,
        rank=args.process_index,
        world=args.world_size,
    )
    trainer = PlanTrainer(
        objective,
        args,
        steps,
        eval_batches=eval_batches(dataset.eval, tokens_at_once=tokens, pad_id=pad_id),
        keep_checkpoints=recipe.train.keep_checkpoints,
        made_with=made_with(recipe, rows),
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.on_part = callback.on_part
    trainer.asks_to_stop = callback.asks_to_stop
    return trainer


def has_tensorboard() -> bool:
    """Curves for tensorboard need one of two packages (the seed installed tensorboardX)."""
    return any(importlib.util.find_spec(name) is not None for name in ("tensorboardX", "tensorboard"))


def tokens_at_once(recipe: Recipe, base: LoadedBase, longest: int) -> int:
    """auto: on CPU small enough for the caches, on CUDA large enough to fill the device; never below one row."""
    if recipe.train.tokens_at_once != "auto":
        return recipe.train.tokens_at_once
    return max(longest, 2048 if base.device.type == "cpu" else 8192)
