"""A job -> the recipe that its training process reads, and the command lines of its processes.

Training is another package behind a process border: this writes its documented file format and imports nothing of it.
What does not depend on the number of examples is fixed when the job is made (`fixed_part`), and kept in its row.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from onebase.durable import replace_file
from onebase_server.jobs.checkpoints import KEPT
from onebase_server.jobs.hyperparameters import to_recipe
from onebase_server.jobs.names import adapter_name
from onebase_server.jobs.orders import FineTuningOrder, RetrainOrder
from onebase_server.jobs.run_data import freeze_dataset
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.jobs.states import FINE_TUNING
from onebase_server.records.tables import JobRow

# What a retrain may set -> (section, key) of the recipe.
KNOBS: Final[Mapping[str, tuple[str, str]]] = {
    "epochs": ("train", "epochs"),
    "max_steps": ("train", "max_steps"),
    "batch_size": ("train", "batch_size"),
    "learning_rate": ("train", "learning_rate"),
    "early_stopping": ("train", "early_stopping"),
    "r": ("lora", "r"),
    "alpha": ("lora", "alpha"),
    "dropout": ("lora", "dropout"),
    "target_modules": ("lora", "target_modules"),
    "use_rslora": ("lora", "use_rslora"),
    "max_tokens": ("data", "max_tokens"),
    "eval_fraction": ("data", "eval_fraction"),
    "tokens_at_once": ("train", "tokens_at_once"),
    "gradient_checkpointing": ("compute", "gradient_checkpointing"),
    "memory_gb": ("compute", "memory_gb"),
    "device": ("compute", "device"),
    "dtype": ("compute", "dtype"),
    "threads": ("compute", "threads"),
}
HELD_OUT: Final = 0.1


def fixed_part(order: FineTuningOrder | RetrainOrder, job_id: str, seed: int) -> dict[str, Any]:
    """The recipe without its files, and without hyperparameters that may still be "auto"."""
    recipe: dict[str, Any] = {"base": order.base.path, "data": {}, "train": {"seed": seed}}
    if order.prompt_format is not None:
        recipe["data"]["prompt_format"] = order.prompt_format
    if order.start_from is not None:
        recipe["resume_from"] = order.start_from
    if isinstance(order, FineTuningOrder):
        recipe["name"] = adapter_name(order.base.id, order.suffix, job_id)
        # All of the file is learnt, as at OpenAI: what is held out is the validation file, if there is one.
        recipe["data"]["eval_fraction"] = 0.0
        recipe["train"]["keep_checkpoints"] = KEPT
        return recipe
    recipe["name"] = order.adapter
    recipe["preset"] = order.preset
    if order.gate is not None:  # the gate measures on what was held out, so something must be
        recipe["data"]["eval_fraction"] = HELD_OUT
    for knob, value in order.hyperparameters.items():
        section, key = KNOBS[knob]
        recipe.setdefault(section, {})[key] = value
    return recipe


def whole_recipe(job: JobRow, folder: RunFolder) -> dict[str, Any]:
    """With the run's files and the decided hyperparameters."""
    recipe = {key: dict(value) if isinstance(value, dict) else value for key, value in job.recipe.items()}
    recipe["data"]["train"] = (
        [str(folder.training)] if job.dataset is None else freeze_dataset(Path(job.dataset), folder)
    )
    if job.validation_file is not None:
        recipe["data"]["eval"] = [str(folder.validation)]
    if job.kind == FINE_TUNING:
        recipe["train"] |= to_recipe(job.hyperparameters)
    return recipe


def write_recipe(job: JobRow, folder: RunFolder) -> None:
    text = yaml.safe_dump(whole_recipe(job, folder), sort_keys=False, allow_unicode=True)
    replace_file(folder.recipe, text.encode())


def train_command(folder: RunFolder, home: Path, alias: str) -> list[str]:
    """Train and publish a version that nobody is served yet; going on from the run's own checkpoint if it has one."""
    return [
        "train", str(folder.recipe), "--home", str(home), "--status", str(folder.status),
        "--run-dir", str(folder.work), "--resume", "--alias", alias, "--no-make-current",
    ]  # fmt: skip


def evaluate_command(folder: RunFolder, home: Path, versions: Sequence[str], max_examples: int) -> list[str]:
    """Measure versions on what the recipe holds out; the result is one JSON file."""
    return [
        "evaluate", str(folder.recipe), "--home", str(home), "--status", str(folder.status), "--no-base",
        *(word for version in versions for word in ("--adapter", version)),
        "--max-examples", str(max_examples), "--out", str(folder.evaluation),
    ]  # fmt: skip
